"""A trace of each decoder layer over a few tokens: products by matrices, norms, and the tensors they took."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qeval.errors import UsageError, first_line
from qeval.models.structure.forward import FinalStates, body_of
from qeval.models.structure.weight_views import stack_of, stacks_of, watch_products, weights_of

_PROBE_TOKENS = 8
_COUNTS = ("num_hidden_layers", "num_layers")
"""The names in configurations for the length of the list of decoder layers: most, LongCat's (which counts twice)."""
_STACKS: Mapping[str, tuple[str, ...]] = {
    "blt": (
        "local_encoder.layers",
        "local_encoder.cross_attn_layers",
        "global_transformer.layers",
        "local_decoder.cross_attn_layers",
        "local_decoder.layers",
    ),
    "hrm_text": ("L_module.layers", "H_module.layers"),
}
"""The lists of decoder layers of the model types that have several, by their names in the body."""

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


def language_config(config: Any) -> Any:
    """Return the part of a configuration that is of the language model, where images or sound come in too.

    Of one of several stacks (BLT's, over bytes and over patches of them) it is that of the largest.
    """
    text = config.get_text_config()
    return getattr(text, "global_config", text)


def text_config(model: Any) -> Any:
    """Return the configuration of the language model itself."""
    return language_config(model.config)


def layer_config(model: Any, layer: int) -> Any:
    """Return the configuration of one decoder layer, where head sizes and the like differ between layers."""
    config = text_config(model)
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """Return a model's decoder layers by name, in the order of the computation.

    Raises:
        UsageError: There is no list of them.
    """
    config, modules = text_config(model), dict(model.named_modules())
    if (stacks := _STACKS.get(model.config.model_type)) is not None:
        lists = [f"{model.base_model_prefix}.{stack}" for stack in stacks]
        return {f"{name}.{index}": layer for name in lists for index, layer in enumerate(modules[name].children())}

    counts = [getattr(config, name, None) for name in _COUNTS]
    inside = {id(module) for module in _text_modules(model)}
    for count in filter(None, counts):
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) == count:
                return {f"{name}.{index}": layer for index, layer in enumerate(module)}
    raise UsageError(f"{type(model).__name__} has no list of {counts[0]} decoder layers that qeval could find.")


def shared_weight(layers: Mapping[str, nn.Module]) -> str | None:
    """Return the name of a weight that two decoder layers share (Zamba's do), or None."""
    owners: dict[int, str] = {}
    for layer, module in layers.items():
        for name, parameter in module.named_parameters(prefix=layer):
            if owners.setdefault(id(parameter), layer) != layer:
                return name
    return None


def _text_modules(model: Any) -> Iterator[nn.Module]:
    """Yield the modules of the decoder, without those of vision towers and the like, which may have as many layers."""
    decoder = model.get_decoder()
    decoder = decoder if isinstance(decoder, PreTrainedModel) else body_of(model)  # ModernBERT's is its head
    others = [
        f"{name}."
        for name, module in decoder.named_modules()
        if isinstance(module, PreTrainedModel)
        and type(module.config) not in (type(decoder.config), type(text_config(model)))
    ]
    return (module for name, module in decoder.named_modules() if not f"{name}.".startswith(tuple(others)))


def key_of(tensor: Any) -> TensorKey | None:
    """Return the key of a tensor; None for anything else."""
    return (tensor.data_ptr(), tensor.numel()) if isinstance(tensor, Tensor) else None


class Trace(NamedTuple):
    """A trace of a few tokens: for each layer what ran in it, and in which order the layers ran, by their places."""

    calls: list[list[TracedCall]]
    order: list[int]


def trace(model: Any, layers: Mapping[str, nn.Module]) -> Trace:
    """Return what ran in each decoder layer, in that order.

    What runs in a block that several layers share is of the first layer that holds it.

    Args:
        model: The causal language model.
        layers: Its decoder layers by name.

    Raises:
        UsageError: The model can't be run as a plain language model.
    """
    _run_few(model, FinalStates)  # where its final states come from is found out before anything is recorded
    calls: list[TracedCall] = []  # holding the tensors keeps their addresses distinct
    order: list[int] = []
    prefixes = tuple(f"{name}." for name in layers)
    stacks = {name: stack for name, stack in stacks_of(model).items() if name.startswith(prefixes)}
    holders = {name.rpartition(".")[0] for name in stacks}
    owners = {id(parameter): name for name, parameter in model.named_parameters()}

    with ExitStack() as hooks:
        for place, layer in enumerate(layers.values()):
            hooks.callback(layer.register_forward_pre_hook(lambda *_, place=place: order.append(place)).remove)
        for name, module in model.named_modules():
            if not name.startswith(prefixes):
                continue
            if name in holders:
                hooks.callback(module.register_forward_pre_hook(_record_entry(calls, name)).remove)
            elif not list(module.children()) or "weight" in module._parameters:  # some routers hold more than a weight
                hooks.callback(
                    module.register_forward_hook(_record_call(calls, _own_name(module, name, owners))).remove
                )
        if stacks:
            slices = {name: weight for name, weight in weights_of(model).items() if stack_of(name) in stacks}
            hooks.enter_context(
                watch_products(model, after={n: _record_product(calls, n, w) for n, w in slices.items()})
            )
        _run_few(model, probe)

    return Trace([list(_of_layer(calls, prefix)) for prefix in prefixes], order)


def _own_name(module: nn.Module, name: str, owners: Mapping[int, str]) -> str:
    """Return what a module is called by its parameters: another's name where it is tied to that (Zamba 2's blocks)."""
    first = next(iter(module.parameters(recurse=False)), None)
    return name if first is None else owners[id(first)].rpartition(".")[0]


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
