"""A checkpoint's tensors laid beside the model that its configuration asks for, before a number is read.

Every tensor is used, known to be of no use, or named; every weight has its tensors, of its shape and of a float type.
transformers renames tensors as it loads them, and makes some weights of several tensors: its own table of that
(`conversion_mapping`) is followed. Whole and streamed loading go through the same checks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qeval.errors import UsageError
from qeval.models.checkpoint.safetensors_rows import read_rows
from qeval.models.checkpoint.weights import FLOATS, TensorEntry, check_complete, shorten_list
from qeval.models.silence_transformers import transformers_errors
from qeval.models.structure.trace import language_config

Sources = dict[str, list[TensorEntry]]
"""What a parameter is made from: the tensors by the pattern that their names follow, in the order of their numbers."""

_QUANTIZED = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_packed", "weight_global_scale",
    "weight_shape", "qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map", "nested_absmax", "SCB",
    "weight_format", "W_q", "scale_weight", "scale_inv",
)  # fmt: skip
"""How the names end of tensors that only quantized weights have: their codes, scales and zero points. Those of
activations (`input_scale`, `k_scale`) leave the weights as they are."""
_ROWS = 4096
"""Rows of a matrix that are compared at a time."""


@dataclass(frozen=True, eq=False)
class Fit:
    """The tensors of a checkpoint that make each of a model's parameters and buffers.

    `sources`: by the parameter's name; `converters`: the conversion of each pattern in them that needs one. `untied`:
    parameters that the configuration ties to another, and that are stored with other values. `notes`: sentences on
    what of the checkpoint is of no use, or contradicts the configuration.
    """

    sources: Mapping[str, Sources]
    converters: Mapping[str, WeightConverter]
    untied: tuple[str, ...]
    notes: tuple[str, ...]


def check_sizes(config: Any, entries: Sequence[TensorEntry], where: str) -> None:
    """Refuse a configuration of more layers, or another width, than the tensors of a checkpoint can be of.

    Comes before a model is made, which takes time and memory for each layer even where it holds no numbers.

    Raises:
        UsageError: It says which size.
    """
    text = language_config(config)
    layers, width = text.num_hidden_layers, text.hidden_size
    if layers > len(entries):
        raise UsageError(f"'{where}': its config.json asks for {layers:,} layers, but it holds {len(entries)} tensors.")
    if not any(width in entry.shape for entry in entries):
        raise UsageError(f"'{where}': its config.json asks for hidden_size {width:,}, which no tensor in it has.")


def check_fit(config: Any, entries: Sequence[TensorEntry], where: str) -> Fit:
    """Lay a checkpoint beside its configuration, as whole loading needs it: names, shapes and types.

    Args:
        config: The transformers configuration.
        entries: The tensors of the checkpoint.
        where: What messages call the checkpoint.

    Returns:
        What is known of the tensors.

    Raises:
        UsageError: A tensor is missing, of another shape, or of a type that needs explaining.
    """
    check_sizes(config, entries, where)
    with transformers_errors(f"'{where}' can't be loaded"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fit = fit_of(model, entries, where)
    wanted = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *saved_buffers(model).items())}
    if not any(len(converter.target_patterns) > 1 for converter in fit.converters.values()):
        check_complete(wanted.keys() - fit.sources.keys(), where)
    for name, shape in wanted.items():
        _check_shape(name, shape, fit, where)
    return fit


def fit_of(model: Any, entries: Sequence[TensorEntry], where: str) -> Fit:
    """Find what of a checkpoint makes which parameter of `model`, which may be without numbers.

    Raises:
        UsageError: A tensor is no float, or codes and scales lie beside weights and nothing says how to read them.
    """
    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]

    sources, unused = _find_sources(model, entries, renamings, converters)
    _check_float(sources, unused, where)
    _check_repeats(sources, by_pattern, where)

    # what a reader must know of the tensors
    untied = _untied_pairs(model, sources)
    notes = [
        f"config.json ties {target} to {source}, but the checkpoint holds the two with other values: each is its own."
        for target, source in untied
    ]
    if named := _unexpected_keys(model, unused):
        notes.append(f"The model does not use some tensors of the checkpoint: {shorten_list(named)}.")

    used = {
        pattern: by_pattern[pattern] for patterns in sources.values() for pattern in patterns if pattern in by_pattern
    }
    return Fit(sources, used, tuple(target for target, _ in untied), tuple(notes))


def saved_buffers(model: Any) -> dict[str, Tensor]:
    """Return the buffers that checkpoints hold, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _find_sources(
    model: Any, entries: Sequence[TensorEntry], renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> tuple[dict[str, Sources], list[str]]:
    """Return the tensors that make each parameter, by its name, and the names of tensors that make none."""
    empty, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Sources] = {}
    unused = []
    for entry in sorted(entries, key=lambda entry: dot_natural_key(entry.name)):
        name, pattern = rename_source_key(entry.name, renamings, converters, prefix, empty)
        if name not in empty and entry.name in empty:
            name, pattern = rename_source_key(entry.name, [], [], prefix, empty)
        if name in empty:
            sources.setdefault(name, {}).setdefault(pattern or entry.name, []).append(entry)
        else:
            unused.append(entry.name)
    return sources, unused


def _check_float(sources: Mapping[str, Sources], unused: Sequence[str], where: str) -> None:
    """Refuse weights that are no plain floats, though nothing says how they are quantized."""
    for name, entry in (
        (name, entry) for name, patterns in sources.items() for part in patterns.values() for entry in part
    ):
        if entry.dtype not in FLOATS and name.endswith(("weight", "bias", "_proj")):
            raise UsageError(
                f"'{where}' holds {entry.name} as {entry.dtype} without what would say how to read that (there is no "
                "quantization_config in its config.json); the baseline must be the float model."
            )
    if scales := sorted(name for name in unused if name.endswith(_QUANTIZED)):
        raise UsageError(
            f"'{where}' holds codes or scales of quantized weights ({shorten_list(scales)}) without what would say "
            "how to read them (there is no quantization_config in its config.json); the baseline must be the float "
            "model."
        )


def _check_repeats(sources: Mapping[str, Sources], converters: Mapping[str, WeightConverter], where: str) -> None:
    """Refuse two tensors that are one parameter by different names, with other values."""
    for name, patterns in sources.items():
        plain = [part[0] for pattern, part in patterns.items() if pattern not in converters]
        if other := next((entry for entry in plain[1:] if not _hold_same_values(plain[0], entry)), None):
            first = plain[0]
            raise UsageError(
                f"'{where}' holds {name} twice with other values, as {first.name} and as {other.name}; remove one."
            )


def _untied_pairs(model: Any, sources: dict[str, Sources]) -> list[tuple[str, str]]:
    """Return the parameters that are stored with other values than those they are tied to.

    Where one of two lacks, the other stands for both.
    """
    pairs = []
    listed = {name for name, _ in model.named_parameters()}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source not in sources and target in sources:
            sources[source] = sources[target]
        elif target in listed and target not in sources and source in sources:  # CamemBERT's head is listed first
            sources[target] = sources[source]
        elif (
            source in sources
            and target in sources
            and not _hold_same_values(_first_entry(sources[target]), _first_entry(sources[source]))
        ):
            pairs.append((target, source))
    return pairs


def _first_entry(sources: Sources) -> TensorEntry:
    return next(iter(sources.values()))[0]


def _hold_same_values(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two tensors hold the same values, by their bytes where their types are one."""
    if one.shape != other.shape or not one.shape:
        return one == other
    return all(
        torch.equal(*(read_rows(entry, start, min(start + _ROWS, one.shape[0])).float() for entry in (one, other)))
        for start in range(0, one.shape[0], _ROWS)
    )


def _check_shape(name: str, shape: tuple[int, ...], fit: Fit, where: str) -> None:
    """Refuse a tensor of another shape than its parameter, or parts that do not add up to it."""
    patterns = fit.sources.get(name, {})
    steps = [
        type(step).__name__
        for pattern in patterns
        if pattern in fit.converters
        for step in fit.converters[pattern].operations
    ]
    if not patterns or not {*steps} <= {"MergeModulelist", "Concatenate"}:
        return  # what else makes it of others is transformers' to check

    entries = [entry for part in patterns.values() for entry in part]
    fits = entries[0].shape == shape if not steps else sum(map(_numbers, entries)) == math.prod(shape)
    if not fits:
        size = (
            list(entries[0].shape)
            if not steps
            else f"{len(entries)} tensors of {sum(map(_numbers, entries)):,} numbers"
        )
        raise UsageError(
            f"'{where}' holds {name} as {size}, its config.json asks for {list(shape)}; one of them is another model's."
        )


def _numbers(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


def _unexpected_keys(model: Any, unused: Sequence[str]) -> list[str]:
    """Return the names among `unused` that transformers would warn of: some are known to be harmless."""
    keys = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unused))
    model._adjust_missing_and_unexpected_keys(keys)
    return sorted(keys.unexpected_keys)
