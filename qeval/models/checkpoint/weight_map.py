"""The places of a model's weights in a checkpoint: under their own names, others', in parts, or expert by expert.

`fit.py` finds which tensors make which weight; here each becomes something that can be read by rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Split, WeightConverter

from qeval.errors import UsageError
from qeval.models.checkpoint.fit import Sources, fit_of, saved_buffers
from qeval.models.checkpoint.safetensors_rows import Plain, RowsOfParts, StoredTensor, Transposed
from qeval.models.checkpoint.weights import TensorEntry, check_complete
from qeval.models.structure.weight_views import expert_name, stacks_of, transposed_weights, weights_of


@dataclass(frozen=True, eq=False)
class WeightMap:
    """The places of a model's weights in a checkpoint, and of the buffers that are stored with them.

    Weights are named as by `weight_views.weights_of`. Also sentences on what else the checkpoint holds, and heads that
    are no longer their embedding.
    """

    stored: Mapping[str, StoredTensor]
    notes: tuple[str, ...]
    untied: tuple[str, ...]


def map_weights(model: Any, entries: Sequence[TensorEntry], where: str) -> WeightMap:
    """Find every weight of `model`, which may be without numbers, among the tensors of a checkpoint.

    Raises:
        UsageError: The checkpoint lacks a tensor, holds another shape, or keeps a weight in a form that can't be read
            by rows.
    """
    fit = fit_of(model, entries, where)
    stacks, turned = stacks_of(model), transposed_weights(model)
    stored: dict[str, StoredTensor] = {}
    for name, sources in fit.sources.items():
        pattern, parts = next(iter(sources.items()))
        if pattern in fit.converters and (rows := _rows_of_parts(sources, fit.converters[pattern])):
            stored[name] = rows
        elif pattern in fit.converters and (pieces := _pieces(model, name, parts[0], fit.converters[pattern], where)):
            stored |= pieces
        elif pattern in fit.converters:
            stored |= _experts(name, sources, fit.converters[pattern], len(stacks.get(name, ())), where)
        elif name in stacks:
            slices = enumerate(_stack_slices(parts[0]))
            stored |= {expert_name(name, i): Transposed(part) if name in turned else part for i, part in slices}
        else:
            stored[name] = Transposed(Plain(parts[0])) if name in turned else Plain(parts[0])
    _check(model, stored, where)
    return WeightMap(stored, fit.notes, fit.untied)


def _rows_of_parts(sources: Sources, how: WeightConverter) -> RowsOfParts | None:
    """Return a weight whose parts are laid one below the other as they are loaded; None where more is done to them."""
    if [(type(step), getattr(step, "dim", None)) for step in how.operations] != [(Concatenate, 0)]:
        return None
    return RowsOfParts(tuple(Plain(part) for pattern in how.source_patterns for part in sources.get(pattern, ())))


def _pieces(
    model: Any, name: str, entry: TensorEntry, how: WeightConverter, where: str
) -> dict[str, StoredTensor] | None:
    """Return the weights that one tensor is divided into by rows as it is loaded; None where more is done to it.

    Args:
        model: The model.
        name: The first of the weights.
        entry: The tensor.
        how: The conversion.
        where: The checkpoint, for messages.

    Raises:
        UsageError: The tensor has more rows than the weights, or fewer.
    """
    if [(type(step), getattr(step, "dim", None)) for step in how.operations] not in ([(Split, 0)], [(Chunk, 0)]):
        return None
    names = [name.replace(how.target_patterns[0], target) for target in how.target_patterns]
    rows = [model.get_parameter(each).shape[0] for each in names]
    if sum(rows) != entry.shape[0]:
        raise UsageError(f"'{where}' holds {entry.name} as {list(entry.shape)}, its model needs {sum(rows)} rows.")
    row_bytes = (entry.end - entry.start) // entry.shape[0]
    starts = [entry.start + row_bytes * sum(rows[:place]) for place in range(len(rows))]
    return {
        each: Plain(replace(entry, shape=(count, *entry.shape[1:]), start=start, end=start + count * row_bytes))
        for each, count, start in zip(names, rows, starts, strict=True)
    }


def _experts(name: str, sources: Sources, how: WeightConverter, count: int, where: str) -> dict[str, StoredTensor]:
    """Return the matrices of a stack whose parts lie expert by expert, `count` of each kind."""
    steps = [(type(step), getattr(step, "dim", None)) for step in how.operations]
    if not count or steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        raise UsageError(
            f"'{where}' keeps {name} in a form that is converted as it is loaded "
            f"({', '.join(type(step).__name__ for step in how.operations)}), which --stream can't read; leave it out."
        )
    kinds = [sources.get(pattern, []) for pattern in how.source_patterns]
    if wrong := [
        (pattern, len(kind)) for pattern, kind in zip(how.source_patterns, kinds, strict=True) if len(kind) != count
    ]:
        raise UsageError(f"'{where}' holds {wrong[0][1]} tensors *{wrong[0][0]} for {name}, its model needs {count}.")
    parts = [tuple(map(Plain, pieces)) for pieces in zip(*kinds, strict=True)]
    return {
        expert_name(name, i): pieces[0] if len(pieces) == 1 else RowsOfParts(pieces) for i, pieces in enumerate(parts)
    }


def _stack_slices(entry: TensorEntry) -> Iterator[Plain]:
    """Yield every matrix of a stack that is stored as one tensor."""
    step = (entry.end - entry.start) // entry.shape[0]
    for start in range(entry.start, entry.end, step):
        yield Plain(replace(entry, shape=entry.shape[1:], start=start, end=start + step))


def _check(model: Any, stored: Mapping[str, StoredTensor], where: str) -> None:
    """Refuse a checkpoint in which a weight is missing or of another shape."""
    weights = weights_of(model) | saved_buffers(model)
    check_complete(weights.keys() - stored.keys(), where)
    for name, weight in weights.items():
        if stored[name].shape != tuple(weight.shape):
            raise UsageError(
                f"'{where}' holds {name} as {list(stored[name].shape)}, its model needs {list(weight.shape)}."
            )
