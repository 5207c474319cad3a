"""A foreign graph's weights laid beside the baseline's before anything is scored, one matrix in memory at a time.

Judged as a checkpoint's are (`formats/match_baseline.py`). AWQ's and SmoothQuant's scales are undone by what the graph
multiplies the input of each product by: its norm's gain, a Mul in front of it. What could not be compared is said.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor

from qeval.backends.onnx.inspection import Parsed
from qeval.backends.onnx.matrices import Stored
from qeval.backends.onnx.pairing import NOT_ALIKE, OTHER_SHAPE, Pairing, Piece, pair
from qeval.backends.onnx.reading import input_gain, read, why_unread
from qeval.backends.onnx.tensors import vectors_of
from qeval.errors import UsageError
from qeval.formats.assemble import check_finite_matrix
from qeval.formats.base import DecodedMatrix
from qeval.formats.match_baseline import (
    OTHER_MODEL,
    SAME,
    BaselineWeights,
    check_resemblance,
    check_same,
    relative_distance,
)
from qeval.formats.misreadings import rows_of, values_of
from qeval.formats.stack import stack_rows
from qeval.models.checkpoint.weights import shorten_list
from qeval.models.structure.graph import Description, Fold

_SAMPLE_ROWS = 1024
_NEAR = 0.02
"""An embedding that is so nearly the root of its width times the baseline's has the model's multiplier in it."""
_INTERLEAVED = ("rotary_interleaved", "interleaved")
_ALIKE = 0.5
"""A head whose rows have at least this cosine with the baseline's, all together, has them in the same order."""


def check_same_model(graph: ir.Graph, model: Any, description: Description) -> None:
    """Refuse the graph of another model: none of its vectors is the gain of the baseline's last norm.

    Quantizers leave that gain alone, but a graph may hold it with the 1 that Gemma adds. A model without one, and a
    graph without a vector of its length, tell nothing.

    Raises:
        UsageError: the graph has vectors of that length, and none is the gain.
    """
    if (last := last_norm(model, description)) is None:
        return
    name, gain = last
    vectors = list(vectors_of(graph, len(gain)))
    nearest = min((relative_distance(vector, norm) for vector in vectors for norm in (gain, gain + 1)), default=0.0)
    if nearest > SAME:
        raise UsageError(
            f"the nearest of its {len(vectors)} vectors of {len(gain)} numbers differs from the baseline's "
            f"{name} by {100 * nearest:.2g} %, {OTHER_MODEL}"
        )


def last_norm(model: Any, description: Description) -> tuple[str, Tensor] | None:
    """Return the name and the gain [d_model], fp32, of the norm before the head; None where it has none."""
    inside = tuple(f"{layer}." for layer in description.layers)
    outside = [
        (name, parameter.detach().float().cpu())
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.endswith("weight") and not name.startswith(inside)
    ]
    return outside[-1] if outside else None


def check_weights(parsed: Parsed, baseline: BaselineWeights) -> str:
    """Refuse a graph with a matrix that is not the baseline's, and say how much of it was compared.

    Raises:
        UsageError: it names the first such matrix, and what would explain it.
    """
    if any(parameter.is_meta for parameter in baseline.parameters.values()):
        return "no matrix of it: --stream does not hold the baseline's weights"
    stored, places = parsed.stored, _distinct(parsed.stored, tied=baseline.description.tied)
    left = {place: why for place in places if (why := why_unread(stored[place]))}
    reader = _Reader(stored)
    pairing = pair(stored, [place for place in places if place not in left], baseline, reader.peek)
    left |= pairing.left
    missing = _missing(pairing.pieces, left, len(parsed.facts.ports.present), baseline.description)
    scales = _scales(reader, pairing.pieces, baseline, dict(_odd(parsed.graph, pairing, baseline, reader)))
    left |= {piece.stored: why for name, why in scales.unknown.items() for piece in pairing.pieces[name]}
    found = _Found(reader, {n: places for n, places in pairing.pieces.items() if n not in scales.unknown}, scales.norms)
    for name in found.untouched:
        check_same(name, values_of(found.matrix(name)), baseline.parameters[name])
    check_resemblance(found, scales.inputs, baseline, loose=found.floats)
    return _summary(len(places), left, missing)


def _missing(found: Collection[str], left: Mapping[int, str], caches: int, about: Description) -> list[str]:
    """Return the baseline's matrices that the graph, with keys and values of `caches` layers, has no place for.

    Of linears only where all matrices were told apart: operators that qeval doesn't know may hold these.

    Raises:
        UsageError: no matrix is one of the baseline's, or whole layers are not there.
    """
    missing = [name for group in about.groups for name in group.names if name not in found]
    layers = {group.layer for group in about.groups if any(name in found for name in group.names)}
    if left and not layers and all(why in (OTHER_SHAPE, NOT_ALIKE) for why in left.values()):
        raise UsageError(
            f"none of its {len(left)} matrices has the shape and the values of a linear of the baseline: it is another "
            "model's."
        )
    if missing and not left and len(layers) == caches < len(about.layers):
        raise UsageError(f"it lacks {shorten_list(missing)}, which the baseline has: it is another model's.")
    ends = [name for name in (about.head, about.embedding) if name not in found]
    return [*([] if about.tied and len(ends) == 1 else ends), *([] if left else missing)]


class _Reader:
    """Stored matrices, the last one kept: the rows of several linears may lie in one."""

    def __init__(self, stored: Sequence[Stored]) -> None:
        self.stored = stored
        self._last: tuple[int, DecodedMatrix] | None = None

    def read(self, place: int) -> DecodedMatrix:
        """Return the matrix at a place of the graph."""
        if self._last is None or self._last[0] != place:
            self._last = None
            try:
                self._last = place, read(self.stored[place])
            except (ValueError, RuntimeError, TypeError) as error:  # tensors that do not fit each other
                node = self.stored[place].matrix.node
                raise UsageError(f"its {node} can't be read ({' '.join(str(error).split())}).") from error
        return self._last[1]

    def peek(self, place: int, start: int, stop: int) -> Tensor:
        """Return some of its rows, fp32."""
        return values_of(rows_of(self.read(place), start, stop))


class _Found(Mapping[str, DecodedMatrix | Tensor]):
    """The baseline's parameters in the graph, by name: matrices, read when asked for, and gains of norms."""

    def __init__(self, reader: _Reader, pieces: Mapping[str, Sequence[Piece]], norms: Mapping[str, Tensor]) -> None:
        self._reader, self._pieces, self._norms = reader, pieces, norms
        matrices = {name: [reader.stored[piece.stored].matrix for piece in parts] for name, parts in pieces.items()}
        self.floats = {name for name, parts in matrices.items() if not any(one.quantization for one in parts)}
        """The matrices that the graph holds as floats."""
        self.untouched = {name for name in self.floats if matrices[name][0].role != "body"}
        """The head and the embedding among them: no quantizer changes these, so likeness is not enough."""

    def __getitem__(self, name: str) -> DecodedMatrix | Tensor:
        if name not in self:
            raise KeyError(name)
        return self._norms[name] if name in self._norms else self.matrix(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in chain(self._pieces, self._norms) if name not in self.untouched)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return (name in self._pieces or name in self._norms) and name not in self.untouched

    def matrix(self, name: str) -> DecodedMatrix:
        """Return one of the matrices."""
        pieces = self._pieces[name]
        whole = stack_rows([rows_of(self._reader.read(place), start, stop) for place, start, stop in pieces])
        check_finite_matrix(name, whole)
        return whole


class _Scales(NamedTuple):
    """Factors of a graph's products: gains of norms [columns] by name, numbers of one product alone [columns].

    `unknown`: the matrices that are not judged, with the reason.
    """

    norms: dict[str, Tensor]
    inputs: dict[str, Tensor]
    unknown: dict[str, str]


def _scales(
    reader: _Reader, pieces: Mapping[str, Sequence[Piece]], baseline: BaselineWeights, odd: Mapping[str, str]
) -> _Scales:
    """Return what the graph multiplies each matched matrix's input by, group by group; `odd` are not judged."""
    scales = _Scales({}, {}, dict(odd))
    for group in baseline.description.groups:
        nodes = {name: reader.stored[pieces[name][0].stored].parts.node for name in group.names if name in pieces}
        gains = {name: input_gain(node, group.columns) for name, node in nodes.items()}
        producer = group.fold.parameters[0] if group.fold else None
        if group.fold and producer and baseline.parameters[producer].dim() == 1:
            _after_norm(scales, group.fold, gains)
        elif producer and (producer not in pieces or producer in scales.unknown):
            scales.unknown.update(dict.fromkeys(gains, "after linears that are not compared"))
        else:
            for name, gain in gains.items():
                if gain is None:
                    continue
                likely = gain if producer else _likely(name, gain, pieces, baseline, reader)
                if likely is not None and bool(likely.all()):
                    scales.inputs[name] = likely
                else:
                    scales.unknown[name] = "their inputs are scaled, and by what is not known"
    return scales


def _likely(
    name: str, gain: Tensor, pieces: Mapping[str, Sequence[Piece]], baseline: BaselineWeights, reader: _Reader
) -> Tensor | None:
    """Return the scales of an input that no norm is known to have: `gain`, or ones where that is the norm's."""
    every = (gain, torch.ones_like(gain))
    alike = [_alike(name, pieces[name][0], baseline, reader, candidate) for candidate in every]
    return every[alike[0] <= alike[1]] if max(alike) > _ALIKE else None


def _after_norm(scales: _Scales, fold: Fold, gains: Mapping[str, Tensor | None]) -> None:
    """Set the gain in front of a group to its norm's, whatever was put into it; what differs is a product's own."""
    known = {name: gain for name, gain in gains.items() if gain is not None}
    scales.unknown.update({name: "their norms were not found" for name in gains if name not in known})
    if known:
        first = next(iter(known.values()))
        scales.norms[fold.parameters[0]] = first - float(fold.plus_one)
        factors = {name: torch.where(first == 0, 1.0, gain / first) for name, gain in known.items()}
        scales.inputs.update({name: times for name, times in factors.items() if bool((times != 1).any())})


def _alike(name: str, piece: Piece, baseline: BaselineWeights, reader: _Reader, scales: Tensor | float = 1.0) -> float:
    """Return the cosine of a head's rows with the baseline's, once their columns are multiplied by `scales`."""
    ours = baseline.parameters[name][: baseline.head_dim].float().cpu()
    stored = scales * reader.peek(piece.stored, piece.start, min(piece.stop, piece.start + len(ours)))
    return float(torch.cosine_similarity(stored.flatten(), ours[: len(stored)].flatten(), dim=0))


def _odd(graph: ir.Graph, pairing: Pairing, baseline: BaselineWeights, reader: _Reader) -> Iterator[tuple[str, str]]:
    """Matrices whose values may rightly be others than the baseline's, with the reason."""
    for name in filter(_may_be_turned, pairing.pieces) if _is_interleaved(graph) else ():
        if _alike(name, pairing.pieces[name][0], baseline, reader) < _ALIKE:
            yield name, "their rows may be in the order of an interleaved rotary kernel"
    name = baseline.description.embedding
    if name in pairing.pieces:
        ours = baseline.parameters[name][:_SAMPLE_ROWS].float().cpu()
        stored = reader.peek(pairing.pieces[name][0].stored, 0, len(ours))
        times = float((stored * ours).sum() / ours.square().sum().clamp(min=1e-30))
        if abs(times - math.sqrt(ours.shape[1])) < _NEAR * times:
            yield name, f"{times:.3g} times the baseline's, which is the root of its width: the multiplier is in it"


def _may_be_turned(name: str) -> bool:
    return any(word in name for word in (".q_proj.", ".k_proj.", "qkv"))


def _is_interleaved(graph: ir.Graph) -> bool:
    attributes = (node.attributes.get(name) for node in graph.all_nodes() for name in _INTERLEAVED)
    return any(attribute is not None and attribute.as_int() for attribute in attributes)


def _distinct(stored: Sequence[Stored], *, tied: bool) -> list[int]:
    """Return the matrices' places, one that several nodes use once; a head comes before the embedding it is tied to."""
    found: dict[tuple[str, bool], int] = {}
    for place in sorted(range(len(stored)), key=lambda index: stored[index].matrix.role == "embedding"):
        matrix = stored[place].matrix
        found.setdefault((matrix.weight, matrix.role == "embedding" and not tied), place)
    return sorted(found.values())


def _summary(count: int, left: Mapping[int, str], missing: Sequence[str]) -> str:
    """Say how many matrices were compared with the baseline's, the others by reason, and what was not found."""
    lines = [f"{count - len(left)} of its {count} matrices with the baseline's weights"]
    lines += [f"{number} not ({why})" for why, number in Counter(left.values()).most_common()]
    return "; ".join([*lines, *([f"none was found to be {shorten_list(missing)}"] if missing else [])])
