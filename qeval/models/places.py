"""Where each of a model's weights lies in a checkpoint: under its own name, another's, or expert by expert.

transformers renames tensors as it loads them, and puts matrices that checkpoints keep apart into stacks. Its own table
of that (`conversion_mapping`) is followed here, without a number being read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qeval.errors import UsageError
from qeval.models.matrices import expert_name, stacks_of, turned_in, weights_of
from qeval.models.reader import Joined, Plain, Stored, Turned
from qeval.models.weights import TensorEntry, check_complete

_Sources = dict[str, list[TensorEntry]]
"""What a parameter is made from: the tensors by the pattern that their names follow, in the order of their numbers."""


@dataclass(frozen=True, eq=False)
class Places:
    """Every weight of a model (as `matrices.weights_of` names them) and every buffer that is kept with them as it is
    stored, and tensors that are of no use."""

    stored: Mapping[str, Stored]
    unused: tuple[str, ...]


def places_of(model: Any, entries: Sequence[TensorEntry], where: str) -> Places:
    """Find every weight of `model`, which may be without numbers, among the tensors of a checkpoint.

    Raises:
        UsageError: the checkpoint lacks a tensor, holds another shape, or keeps a weight in a form that can't be read
            by rows.
    """
    table = get_model_conversion_mapping(model)
    converters = [each for each in table if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources, unused = _sources(model, entries, [each for each in table if isinstance(each, WeightRenaming)], converters)
    stacks, turned = stacks_of(model), turned_in(model)
    stored: dict[str, Stored] = {}
    for name, found in sources.items():
        pattern, entries = next(iter(found.items()))
        if pattern in by_pattern:
            stored |= _experts(name, found, by_pattern[pattern], len(stacks.get(name, ())), where)
        elif name in stacks:
            stored |= {expert_name(name, index): part for index, part in enumerate(_slices(entries[0]))}
        else:
            stored[name] = Turned(Plain(entries[0])) if name in turned else Plain(entries[0])
    _check(model, stored, where)
    return Places(stored, _told(model, unused))


def kept_buffers(model: Any) -> dict[str, Tensor]:
    """The buffers that checkpoints hold, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _sources(
    model: Any, entries: Sequence[TensorEntry], renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> tuple[dict[str, _Sources], list[str]]:
    """What each parameter is made from, by its name, and the names of tensors that none is; as transformers does it."""
    empty, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, _Sources] = {}
    unused = []
    for entry in sorted(entries, key=lambda each: dot_natural_key(each.name)):
        name, pattern = rename_source_key(entry.name, renamings, converters, prefix, empty)
        if name not in empty and entry.name in empty:
            name, pattern = rename_source_key(entry.name, [], [], prefix, empty)
        if name in empty:
            found.setdefault(name, {}).setdefault(pattern or entry.name, []).append(entry)
        else:
            unused.append(entry.name)
    return found, unused


def _experts(name: str, found: _Sources, how: WeightConverter, count: int, where: str) -> dict[str, Stored]:
    """The matrices of a stack whose parts lie expert by expert, `count` of each kind."""
    steps = [(type(step), getattr(step, "dim", None)) for step in how.operations]
    if not count or steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        raise UsageError(
            f"'{where}' keeps {name} in a form that is converted as it is loaded "
            f"({', '.join(type(step).__name__ for step in how.operations)}), which --stream can't read; leave it out."
        )
    kinds = [found.get(pattern, []) for pattern in how.source_patterns]
    if wrong := [
        (pattern, len(kind)) for pattern, kind in zip(how.source_patterns, kinds, strict=True) if len(kind) != count
    ]:
        raise UsageError(f"'{where}' holds {wrong[0][1]} tensors *{wrong[0][0]} for {name}, its model needs {count}.")
    parts = [tuple(map(Plain, own)) for own in zip(*kinds, strict=True)]
    return {expert_name(name, i): own[0] if len(own) == 1 else Joined(own) for i, own in enumerate(parts)}


def _slices(entry: TensorEntry) -> Iterator[Plain]:
    """Every matrix of a stack that is stored as one tensor."""
    step = (entry.end - entry.start) // entry.shape[0]
    for start in range(entry.start, entry.end, step):
        yield Plain(replace(entry, shape=entry.shape[1:], start=start, end=start + step))


def _check(model: Any, stored: Mapping[str, Stored], where: str) -> None:
    """Refuse a checkpoint in which a weight is missing or of another shape."""
    weights = weights_of(model) | kept_buffers(model)
    check_complete(weights.keys() - stored.keys(), where)
    for name, weight in weights.items():
        if stored[name].shape != tuple(weight.shape):
            raise UsageError(
                f"'{where}' holds {name} as {list(stored[name].shape)}, its model needs {list(weight.shape)}."
            )


def _told(model: Any, unused: Sequence[str]) -> tuple[str, ...]:
    """The names among `unused` that transformers would tell of: some are known to be harmless."""
    found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unused))
    model._adjust_missing_and_unexpected_keys(found)
    return tuple(sorted(found.unexpected_keys))
