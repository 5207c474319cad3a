"""A trace of each decoder layer over a few tokens: products by matrices, norms, and the tensors they took."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qeval.errors import UsageError, first_line
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.weight_views import stack_of, stacks_of, watch_products, weights_of

_PROBE_TOKENS = 8

TensorKey = tuple[int, int]
"""Where a tensor's numbers lie and how many they are: views of one tensor are alike."""


class TracedCall(NamedTuple):
    """Something that ran. `shape`: (rows, columns) of the matrix it multiplied by, if it did so; `module`: what it is.

    For a module that holds stacks, what it was handed is noted before anything inside it runs.
    """

    name: str
    shape: tuple[int, int] | None
    module: nn.Module | None
    input: Tensor
    output: Any

    @property
    def is_linear(self) -> bool:
        """Return whether it is a layer that multiplies, and does nothing else."""
        return isinstance(self.module, nn.Linear | Conv1D)


def text_config(model: Any) -> Any:
    """Return the configuration of the language model itself, where images or sound come in too."""
    return model.config.get_text_config()


def layer_config(model: Any, layer: int) -> Any:
    """Return the configuration of one decoder layer, where head sizes and the like differ between layers."""
    config = text_config(model)
    by_layer = getattr(config, "per_layer_config", None)
    return config if by_layer is None else by_layer[layer]


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's decoder layers.

    Raises:
        UsageError: There is no such list.
    """
    expected = getattr(text_config(model), "num_hidden_layers", None)
    decoder = model.get_decoder() or model
    inside = {id(module) for module in decoder.modules()}  # a vision tower may have as many layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) == expected:
            return name, module
    raise UsageError(f"{type(model).__name__} has no list of {expected} decoder layers that qeval could find.")


def key_of(tensor: Any) -> TensorKey | None:
    """Return the key of a tensor; None for anything else."""
    return (tensor.data_ptr(), tensor.numel()) if isinstance(tensor, Tensor) else None


def trace(model: Any, layers_name: str, layers: nn.ModuleList) -> list[list[TracedCall]]:
    """Return for each layer what ran in it, in that order.

    Raises:
        UsageError: The model can't be run as a plain language model.
    """
    _run_few(model, FinalStates)  # where its final states come from is found out before anything is recorded
    calls: list[TracedCall] = []  # holding the tensors keeps their addresses distinct
    stacks = {name: stack for name, stack in stacks_of(model).items() if name.startswith(f"{layers_name}.")}
    holders = {name.rpartition(".")[0] for name in stacks}

    with ExitStack() as hooks:
        for name, module in layers.named_modules(prefix=layers_name):
            if name in holders:
                hooks.callback(module.register_forward_pre_hook(_record_entry(calls, name)).remove)
            elif not list(module.children()) or "weight" in module._parameters:  # some routers hold more than a weight
                hooks.callback(module.register_forward_hook(_record_call(calls, name)).remove)
        if stacks:
            slices = {name: weight for name, weight in weights_of(model).items() if stack_of(name) in stacks}
            hooks.enter_context(
                watch_products(model, after={n: _record_product(calls, n, w) for n, w in slices.items()})
            )
        _run_few(model, probe)

    return [list(_of_layer(calls, f"{layers_name}.{index}.")) for index in range(len(layers))]


def _run_few(model: Any, run: Callable[[Any], object]) -> None:
    """Run a model on a few tokens.

    Raises:
        UsageError: It takes more than tokens, or fails.
    """
    try:
        run(model)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(
            f"{type(model).__name__} does not give final hidden states for tokens alone ({reason}), so qeval can't "
            "score it."
        ) from error


@torch.inference_mode()
def probe(model: Any, device: torch.device | None = None) -> Tensor:
    """Return the final hidden states [tokens, d_model] of a few fixed tokens, fp32; `device` is the head's own."""
    tokens = probe_tokens(model, device or model.get_output_embeddings().weight.device)
    return FinalStates(model)(tokens)[0].float()


def probe_tokens(model: Any, device: torch.device) -> Tensor:
    """Return the ids [1, tokens] of a few fixed tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens: Tensor = torch.arange(1, _PROBE_TOKENS + 1, device=device).mul(7919) % vocabulary
    return tokens.unsqueeze(0)


def _of_layer(calls: list[TracedCall], prefix: str) -> Iterator[TracedCall]:
    return (call for call in calls if call.name.startswith(prefix))


def _record_entry(calls: list[TracedCall], name: str) -> Any:
    def enter(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            calls.append(TracedCall(name, None, module, args[0], None))

    return enter


def _record_call(calls: list[TracedCall], name: str) -> Any:
    def ran(module: nn.Module, args: Any, output: Any) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        weight = getattr(module, "weight", None)
        rows, columns = weight.shape if isinstance(weight, Tensor) and weight.dim() == 2 else (0, 0)
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        if columns and columns == args[0].shape[-1]:
            calls.append(TracedCall(f"{name}.weight", (rows, columns), module, args[0], output))
        else:
            calls.append(TracedCall(name, None, module, args[0], output))

    return ran


def _record_product(calls: list[TracedCall], name: str, weight: Tensor) -> Any:
    rows, columns = weight.shape

    def multiplied(given: Tensor, output: Tensor) -> None:
        if given.shape[-1] == columns and output.shape[-1] == rows:
            calls.append(TracedCall(name, (rows, columns), None, given, output))

    return multiplied
