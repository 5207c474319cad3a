"""The matrices of a decoder layer that stay in float whatever a recipe says, each of a kind that says why.

They are few and decide much: which experts run, which tokens attention sees, how fast a state decays. Routers, gates
and convolutions are known by their shapes and their modules; indexers and decays by the names that transformers gives
them, since nothing in their shapes tells.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qeval.methods import FloatKind
from qeval.models.structure.trace import TracedCall
from qeval.models.structure.weight_views import is_expert, stack_of

_DECAYS = ("A_log", "dt_")
"""The beginnings of the names of parameters, or of the modules that hold them."""


def kinds_of_products(
    model: Any, config: Any, calls: Sequence[TracedCall], experts: Mapping[str, int]
) -> dict[str, FloatKind]:
    """Return the matrices of one layer that multiply and stay in float, by name.

    Args:
        model: The causal language model.
        config: The layer's configuration.
        calls: What ran in the layer.
        experts: How many matrices each of its stacks holds.
    """
    kinds: dict[str, FloatKind] = {}
    for call in calls:
        if call.shape is None or is_expert(call.name):
            continue
        if _is_router(call, experts):
            kinds[call.name] = "router"
        elif _is_of_indexer(call.name):
            kinds[call.name] = "indexer"
        elif call.is_linear and _is_gate(model, config, call):
            kinds[call.name] = "gate"
    return kinds


def kinds_of_rest(model: nn.Module, layers: Sequence[str], listed: Iterable[str]) -> dict[str, FloatKind]:
    """Return the decoder layers' other parameters of a known kind, by the weight's name or its stack's.

    Args:
        model: The causal language model.
        layers: The names of its decoder layers.
        listed: Weights that are accounted for.
    """
    known = {stack_of(name) for name in listed}
    kinds: dict[str, FloatKind] = {}
    for module_name, module in model.named_modules():
        if not f"{module_name}.".startswith(tuple(f"{layer}." for layer in layers)):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            if name in known or prod(parameter.shape) == max(parameter.shape, default=1):
                continue
            if isinstance(module, _ConvNd):
                kinds[name] = "convolution"
            elif _is_of_indexer(name):
                kinds[name] = "indexer"
            elif _is_named_router(name):  # LongCat's multiplies a copy of its weight in fp32
                kinds[name] = "router"
            elif any(part.startswith(_DECAYS) for part in (leaf, module_name.rpartition(".")[2])):
                kinds[name] = "decay"
            elif "gate" in leaf and parameter.dim() > 2:  # one matrix a head
                kinds[name] = "gate"
    return kinds


def _is_router(call: TracedCall, experts: Mapping[str, int]) -> bool:
    """Return whether a product gives a number an expert, or one number beside experts; or is named a router.

    A module of its own kind that multiplies beside experts is one too, though it may count shared experts.
    """
    assert call.shape is not None
    if _is_named_router(call.name):
        return True
    near = {count for stack, count in experts.items() if call.name.startswith(_block_of(stack))}
    return bool(near) and (call.shape[0] in {1, *near} or not call.is_linear)


def _is_named_router(name: str) -> bool:
    return any("router" in part for part in name.split("."))


def _block_of(stack: str) -> str:
    """Return what the names begin with of the block whose experts a stack holds."""
    return stack.rpartition(".")[0].rpartition(".")[0] + "."


def _is_of_indexer(name: str) -> bool:
    return any("indexer" in part for part in name.split("."))


def _is_gate(model: Any, config: Any, call: TracedCall) -> bool:
    """Return whether a product gives one or two numbers a head: how much of a state is kept, what of a head passes."""
    assert call.shape is not None
    block = model.get_submodule(call.name.removesuffix(".weight").rpartition(".")[0])
    named = {**vars(config), **vars(block)}
    whole = {name: value for name, value in named.items() if isinstance(value, int) and not isinstance(value, bool)}
    heads = {value for name, value in whole.items() if "heads" in name and value > 1}
    sizes = {value for name, value in whole.items() if "head" in name and "dim" in name and value > 1}
    rows = call.shape[0]
    return rows in heads | {2 * count for count in heads} and all(rows % size for size in sizes)
