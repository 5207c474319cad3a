"""Every weight as the quantizers see it, a matrix [outputs, inputs], whatever its module keeps it as; and its inputs.

transformers keeps some matrices otherwise: GPT-2's `Conv1D` as [inputs, outputs], the experts of a layer as one stack
[experts, outputs, inputs], or as gpt-oss and Llama 4 do [experts, inputs, outputs]. Here each is a view [outputs,
inputs], an expert's named `NAME[3]`: what is written into a view is in the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from qeval.errors import UsageError
from qeval.models.structure.precision import outside_autocast

_NO_EXPERTS = {
    "Inkling2LoopMessageAttentionResidual", "RecurrentGemmaRglru", "XLNetRelativeAttention", "ZambaMambaMixer",
}  # fmt: skip
"""The classes of modules whose parameters of three dimensions hold a matrix a head."""

Before = Callable[[Tensor], None]
"""Told the input [..., columns] of a product."""
InputChange = Callable[[Tensor], Tensor]
"""Returns another input [..., columns] of a product."""
After = Callable[[Tensor, Tensor], None]
"""Told the input [..., columns] and the output [..., rows] of a product."""

_PRODUCTS = (nn.functional.linear, Tensor.matmul, torch.matmul, torch.bmm)
"""The functions by which experts multiply; `x @ w` is `Tensor.matmul`."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by name; views where its modules keep matrices transposed or in stacks."""
    turned, stacks = transposed_weights(model), stacks_of(model)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        whole = parameter.mT if name in turned else parameter
        if name in stacks:
            weights |= {expert_name(name, index): whole[index] for index in range(len(whole))}
        else:
            weights[name] = whole
    return weights


def names_of_weights(model: nn.Module) -> dict[str, str]:
    """Return every name of each weight, and the one that `weights_of` has it by: blocks that layers share have more."""
    first, stacks = {id(parameter): name for name, parameter in model.named_parameters()}, stacks_of(model)
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = first[id(parameter)]
        if own in stacks:
            names |= {expert_name(name, index): expert_name(own, index) for index in range(len(parameter))}
        else:
            names[name] = own
    return names


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Return the weights that a model keeps as [inputs, outputs], or as [experts, inputs, outputs], by name."""
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return frozenset(turned | {name for name in stacks_of(model) if _has_transposed_stacks(_holder(model, name))})


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return one weight as `weights_of` has it now."""
    holder, _, leaf = stack_of(name).rpartition(".")
    module = model.get_submodule(holder)
    parameter: Tensor = module.get_parameter(leaf)
    if is_expert(name):
        matrix = parameter[expert_of(name)]
        return matrix.T if _has_transposed_stacks(module) else matrix
    return parameter.T if isinstance(module, Conv1D) and leaf == "weight" else parameter


def modules_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that multiply by a weight: its own, and those that are tied to it (Zamba 2's shared blocks).

    Args:
        model: The causal language model.
        name: The weight's, or a module's, which is then the only one.
    """
    own = model.get_submodule(name.removesuffix(".weight"))
    weight = own._parameters.get("weight")
    if weight is None:
        return [own]
    return [each for each in model.modules() if type(each) is type(own) and each._parameters.get("weight") is weight]


def stacks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold a matrix an expert, by name: in three dimensions, no convolution's or head's."""
    return {
        f"{name}.{key}".removeprefix("."): parameter
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd) and type(module).__name__ not in _NO_EXPERTS
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape[1:]) > 1
    }


def _holder(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a parameter."""
    return model.get_submodule(name.rpartition(".")[0])


def _has_transposed_stacks(module: nn.Module) -> bool:
    """Return whether a module's stacks are [experts, inputs, outputs].

    transformers says so of the experts that it can run in several ways. Of others (Llama 4's) the shapes do: what comes
    out of `down_proj` is as wide as what enters `gate_up_proj`, which gives twice what enters `down_proj`.
    """
    if isinstance(stated := getattr(module, "is_transposed", None), bool):
        return stated
    stacks = dict(module.named_parameters(recurse=False))
    if not {"gate_up_proj", "down_proj"} <= stacks.keys():
        return False
    (_, *entering), (_, *leaving) = stacks["gate_up_proj"].shape, stacks["down_proj"].shape
    return entering == [leaving[-1], 2 * leaving[0]]


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
    model: Any,
    before: Mapping[str, Before] | None = None,
    after: Mapping[str, After] | None = None,
    *,
    all_experts: bool = False,
) -> Iterator[None]:
    """Call back at every product by the named weights, before or after it is computed.

    A module's name may stand for a weight's: then its first input is handed over. Experts run one by one meanwhile, and
    each sees the tokens that are routed to it.

    Args:
        model: The model.
        before: Callbacks by the weight's name, called with the input.
        after: Callbacks by the weight's name, called with input and output.
        all_experts: Whether each expert sees every token, not those routed to it alone. Outputs stay what they are.

    Raises:
        UsageError: `all_experts`, and a model hands its experts their tokens in a way that is not known.
    """
    before = {name: outside_autocast(early) for name, early in (before or {}).items()}
    after = {name: outside_autocast(late) for name, late in (after or {}).items()}
    with ExitStack() as stack:
        for name, early in before.items():
            for module in () if is_expert(name) else modules_of(model, name):
                stack.callback(module.register_forward_pre_hook(_before_hook(early)).remove)
        for name, late in after.items():
            for module in () if is_expert(name) else modules_of(model, name):
                stack.callback(module.register_forward_hook(_after_hook(late)).remove)
        if any(map(is_expert, (*before, *after))):
            stack.enter_context(one_by_one(model))
            stack.enter_context(_slices(model, before, after, {}, all_experts=all_experts))
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
    model: Any,
    before: Mapping[str, Before],
    after: Mapping[str, After],
    changes: Mapping[str, InputChange],
    *,
    all_experts: bool = False,
) -> Iterator[None]:
    with ExitStack() as stack:
        slices = stack.enter_context(_Slices(before, after, changes))
        for holder, stacks in slices.stacks.items():
            module = model.get_submodule(holder)
            stack.callback(module.register_forward_pre_hook(slices.entered(stacks)).remove)
            if all_experts:
                stack.callback(module.register_forward_pre_hook(slices.show_all_experts).remove)
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
    """A watch on products by a stack's matrices, which no module's hook sees; it may change what is multiplied.

    They are known by their address. One expert's is `linear(x, stack[expert])` or `x @ stack[expert]`, all experts' at
    once `bmm(x, stack)`. Addresses are looked at whenever the module that holds the stacks is entered: where layers are
    in memory one at a time, the same place holds another layer's experts then.
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

    def show_all_experts(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Run a module of experts with every token routed to each, then look away from the run that counts."""
        module.forward(*_routed_to_all(module, args))
        self._names.clear()

    def left(self, *_: Any) -> None:
        """Forget the slices once the module ran."""
        self._names.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = self._names.get(args[1].data_ptr()) if function in _PRODUCTS and len(args) > 1 else None
        if name is None:
            return function(*args, **(kwargs or {}))
        if function is torch.bmm:
            return self._multiply_all(stack_of(name), *args)
        if change := self._changes.get(name):
            args = (change(args[0]), *args[1:])
        if early := self._before.get(name):
            early(args[0])
        output = function(*args, **(kwargs or {}))
        if late := self._after.get(name):
            late(args[0], output)
        return output

    def _multiply_all(self, stack: str, inputs: Tensor, matrices: Tensor) -> Tensor:
        """Return `bmm(inputs, matrices)`; an expert's rows of zeros are tokens that were not routed to it."""
        names = [expert_name(stack, index) for index in range(len(matrices))]
        if self._changes:
            changed = {
                name: self._changes[name](rows)
                for name, rows in zip(names, inputs, strict=True)
                if name in self._changes
            }
            inputs = torch.stack([changed.get(name, rows) for name, rows in zip(names, inputs, strict=True)])
        for name, rows in zip(names, inputs, strict=True):
            if early := self._before.get(name):
                early(rows[rows.any(-1)])
        outputs = torch.bmm(inputs, matrices).unbind()
        for name, rows, output in zip(names, inputs, outputs, strict=True):
            if late := self._after.get(name):
                late(rows, output)
        return torch.stack(outputs)  # of what `after` was given, so that gradients pass through it


def _routed_to_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the arguments of a module of experts by which each expert is given every token.

    transformers hands over tokens [tokens, d_model] with the experts of each and their shares, [tokens, chosen] both;
    Llama 4 tokens [experts * tokens, d_model], of zeros where an expert is not chosen, and each token has one.

    Raises:
        UsageError: It is neither.
    """
    experts = len(next(parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3))
    match args:
        case (Tensor() as tokens, Tensor() as chosen, Tensor() as shares) if chosen.shape == shares.shape:
            every = torch.arange(experts, device=chosen.device, dtype=chosen.dtype).expand(len(tokens), -1)
            return tokens, every, shares.new_zeros(every.shape)
        case (Tensor() as tokens,) if len(tokens) % experts == 0:
            return (tokens.reshape(experts, -1, tokens.shape[-1]).sum(0).repeat(experts, 1),)
        case _:
            raise UsageError(
                f"--calibrate-all-experts: {type(module).__name__} is not handed its tokens in a way that qeval knows; "
                "leave it out."
            )


def _before_hook(call: Before) -> Any:
    return lambda _, args: call(args[0])


def _after_hook(call: After) -> Any:
    return lambda _, args, output: call(args[0], output)
