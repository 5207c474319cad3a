"""Every weight as the quantizers see it, a matrix [outputs, inputs], whatever its module keeps it as; and its inputs.

transformers keeps some matrices otherwise: GPT-2's `Conv1D` as [inputs, outputs], the experts of a layer as one stack
[experts, outputs, inputs]. Here the first is its transposed view and the second a view an expert, named `NAME[3]`:
what is written into a view is in the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from qeval.models.structure.precision import outside_autocast

Before = Callable[[Tensor], None]
"""Told the input [..., columns] of a product."""
InputChange = Callable[[Tensor], Tensor]
"""Returns another input [..., columns] of a product."""
After = Callable[[Tensor, Tensor], None]
"""Told the input [..., columns] and the output [..., rows] of a product."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by name; views where its modules keep matrices transposed or in stacks."""
    turned, stacks = transposed_weights(model), stacks_of(model)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in stacks:
            weights |= {expert_name(name, index): parameter[index] for index in range(len(parameter))}
        else:
            weights[name] = parameter.T if name in turned else parameter
    return weights


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Return the weights that a model keeps as [inputs, outputs], by name."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return one weight as `weights_of` has it now."""
    holder, _, leaf = stack_of(name).rpartition(".")
    module = model.get_submodule(holder)
    parameter: Tensor = module.get_parameter(leaf)
    if is_expert(name):
        return parameter[expert_of(name)]
    return parameter.T if isinstance(module, Conv1D) and leaf == "weight" else parameter


def stacks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold a matrix an expert, by name: three dimensions, and no convolution's."""
    return {
        f"{name}.{key}".removeprefix("."): parameter
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def expert_name(stack: str, index: int) -> str:
    """Return what an expert's matrix in a stack is called."""
    return f"{stack}[{index}]"


def is_expert(name: str) -> bool:
    """Return whether a weight is an expert's, in a stack."""
    return name.endswith("]")


def stack_of(name: str) -> str:
    """Return the stack that an expert's matrix is in; any other weight's own name."""
    return name.partition("[")[0]


def expert_of(name: str) -> int:
    """Return which of its stack's matrices an expert's is, from 0."""
    return int(name.partition("[")[2].removesuffix("]"))


@contextmanager
def watch_products(
    model: Any, before: Mapping[str, Before] | None = None, after: Mapping[str, After] | None = None
) -> Iterator[None]:
    """Call back at every product by the named weights, before or after it is computed.

    A module's name may stand for a weight's: then its first input is handed over. Experts run one by one meanwhile, and
    each sees the tokens that are routed to it.

    Args:
        model: The model.
        before: Callbacks by the weight's name, called with the input.
        after: Callbacks by the weight's name, called with input and output.
    """
    before = {name: outside_autocast(early) for name, early in (before or {}).items()}
    after = {name: outside_autocast(late) for name, late in (after or {}).items()}
    with ExitStack() as stack:
        for name, early in before.items():
            if not is_expert(name):
                stack.callback(_module(model, name).register_forward_pre_hook(_before_hook(early)).remove)
        for name, late in after.items():
            if not is_expert(name):
                stack.callback(_module(model, name).register_forward_hook(_after_hook(late)).remove)
        if any(map(is_expert, (*before, *after))):
            stack.enter_context(one_by_one(model))
            stack.enter_context(_slices(model, before, after, {}))
        yield


@contextmanager
def changed_expert_inputs(model: Any, changes: Mapping[str, InputChange]) -> Iterator[None]:
    """Have the inputs of experts' products changed inside a `with` block; the experts run one by one meanwhile.

    Args:
        model: The model.
        changes: Returns another input [tokens, columns], by the expert's name.
    """
    with one_by_one(model), _slices(model, {}, {}, changes):
        yield


@contextmanager
def _slices(
    model: Any, before: Mapping[str, Before], after: Mapping[str, After], changes: Mapping[str, InputChange]
) -> Iterator[None]:
    with ExitStack() as stack:
        slices = stack.enter_context(_Slices(before, after, changes))
        for holder, stacks in slices.stacks.items():
            module = model.get_submodule(holder)
            stack.callback(module.register_forward_pre_hook(slices.entered(stacks)).remove)
            stack.callback(module.register_forward_hook(slices.left).remove)
        yield


@contextmanager
def one_by_one(model: Any) -> Iterator[None]:
    """Have experts multiply one after the other, where transformers would group their products."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _Slices(TorchFunctionMode):
    """A watch on `linear(x, stack[expert])`, which no module's hook sees; it may change `x`.

    Slices are known by their addresses, which are looked at whenever the module that holds the stacks is entered: where
    layers are in memory one at a time, the same place holds another layer's experts then.
    """

    def __init__(
        self, before: Mapping[str, Before], after: Mapping[str, After], changes: Mapping[str, InputChange]
    ) -> None:
        super().__init__()
        self._before, self._after, self._changes = before, after, changes
        self._names: dict[int, str] = {}
        self.stacks: dict[str, list[str]] = {}
        """The stacks that are watched, by the module that holds them."""
        for name in dict.fromkeys(stack_of(name) for name in (*before, *after, *changes) if is_expert(name)):
            self.stacks.setdefault(name.rpartition(".")[0], []).append(name)

    def entered(self, stacks: Sequence[str]) -> Any:
        """Return what is to be called before a module that holds `stacks` runs."""

        def enter(module: nn.Module, _: Any) -> None:
            for name in stacks:
                stack = module.get_parameter(name.rpartition(".")[2])
                first, step = stack.data_ptr(), stack.stride(0) * stack.element_size()
                self._names |= {first + index * step: expert_name(name, index) for index in range(len(stack))}

        return enter

    def left(self, *_: Any) -> None:
        """Forget the slices once the module ran."""
        self._names.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if function is not nn.functional.linear or len(args) < 2:
            return function(*args, **(kwargs or {}))
        name = self._names.get(args[1].data_ptr(), "")
        if change := self._changes.get(name):
            args = (change(args[0]), *args[1:])
        if early := self._before.get(name):
            early(args[0])
        output = function(*args, **(kwargs or {}))
        if late := self._after.get(name):
            late(args[0], output)
        return output


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.removesuffix(".weight"))


def _before_hook(call: Before) -> Any:
    return lambda _, args: call(args[0])


def _after_hook(call: After) -> Any:
    return lambda _, args, output: call(args[0], output)
