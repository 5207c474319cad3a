"""Pair a graph's matrices with the baseline's: by name where exporters keep names, else by their values.

Exporters that keep a layer's number and a linear's name in those of nodes (the model builder, optimum, torch) are
believed, so that a matrix in another's place is found. Others are told apart by their first rows, in the order of the
layers, and the last ones of a shape by elimination. What remains is left, with its reason. A graph may hold the rows of
several linears as one (`qkv_proj`), or those of one apart (`gate_proj` of a `gate_up_proj`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cosine_similarity

from qeval.backends.onnx.matrices import Stored
from qeval.formats.match_baseline import BaselineWeights
from qeval.models.structure.graph import Group
from qeval.models.structure.weight_views import is_expert

Peek = Callable[[int, int, int], Tensor]
"""Some rows (from, to) of a stored matrix (its place among all), fp32."""

NOT_ALIKE = "not told apart from others of their shape"
OTHER_SHAPE = "of a shape that no linear of the baseline has"
_LAYER = re.compile(r"(?:^|[./_])(?:layers?|blocks?|h)[./_](\d+)(?=[./_])")
_SCOPES = "pkg.torch.onnx.name_scopes"
_SAMPLE_ROWS = 16
_ALIKE, _CLEAR = 0.3, 0.1
"""The least cosine of sampled rows of one matrix, quantized and with AWQ's scales folded in, and its lead over others:
unrelated matrices have less than 0.05."""


class Piece(NamedTuple):
    """Rows of a stored matrix."""

    stored: int
    start: int
    stop: int


@dataclass(frozen=True)
class Pairing:
    """The stored rows of the baseline's matrices, by name, and the stored matrices left out, with the reasons."""

    pieces: Mapping[str, tuple[Piece, ...]]
    left: Mapping[int, str]


class _Part(NamedTuple):
    name: str
    start: int
    stop: int


class _Candidate(NamedTuple):
    """A stored matrix's possible content: rows of the baseline's linears in turn, and what exporters call it.

    `sure`: what has this name has these rows.
    """

    layer: int
    label: str
    parts: tuple[_Part, ...]
    sure: bool = True


def pair(stored: Sequence[Stored], places: Sequence[int], baseline: BaselineWeights, peek: Peek) -> Pairing:
    """Find which of the baseline's matrices those at `places` of `stored` are."""
    search = _Search(stored, baseline, peek)
    body = [place for place in places if stored[place].matrix.role == "body"]
    for place in places:
        if place not in body:
            search.take_vocabulary(place)
    search.take_named(body)
    search.take_alike(body)
    search.take_last(body)
    return search.pairing(places)


@dataclass
class _Search:
    stored: Sequence[Stored]
    baseline: BaselineWeights
    peek: Peek
    claims: dict[int, _Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.baseline.description.groups
        self._candidates = [each for group in groups for each in _of_group(group, self.baseline)]
        numbers = {number for place in range(len(self.stored)) if (number := self._layer(place)) is not None}
        self._numbered = numbers == set(range(len(self.baseline.description.layers)))

    def take_vocabulary(self, place: int) -> None:
        """Take the head or the embedding; rows beyond the baseline's are padding."""
        matrix, about = self.stored[place].matrix, self.baseline.description
        name = about.head if matrix.role == "head" else about.embedding
        rows, columns = self.baseline.parameters[name].shape
        if matrix.columns == columns and matrix.rows >= rows:
            self.claims[place] = _Candidate(-1, name, (_Part(name, 0, rows),))

    def take_named(self, body: Sequence[int]) -> None:
        """Take those whose names say which layer's linear they are."""
        for place in body if self._numbered else ():
            named = [each for each in self._options(place) if each.label in self._words(place) and each.sure]
            if len(named) == 1 and self._layer(place) is not None:
                self.claims[place] = named[0]

    def take_alike(self, body: Sequence[int]) -> None:
        """Take those whose first rows are clearly nearest to one linear's, layers in the order of the computation."""
        found: dict[int, _Candidate] = {}
        for place in self._open(body):
            ranked = sorted(((self._alike(place, each), each) for each in self._options(place)), reverse=True)
            second = ranked[1][0] if len(ranked) > 1 else 0.0
            if ranked and ranked[0][0] > max(_ALIKE, second + _CLEAR):
                found[place] = ranked[0][1]
                if self._numbered:
                    self.claims[place] = ranked[0][1]
        if not self._numbered:
            self.claims |= _in_order(found)

    def take_last(self, body: Sequence[int]) -> None:
        """Take what is left of a shape (in a layer, where names tell layers) in order, if the counts agree."""
        last: dict[tuple[_Candidate, ...], list[int]] = defaultdict(list)
        for place in self._open(body):
            last[tuple(each for each in self._options(place) if each.sure)].append(place)
        for options, places in last.items():
            if len(options) == len(places):
                self.claims |= dict(zip(places, sorted(options, key=lambda each: each.layer), strict=True))

    def pairing(self, places: Sequence[int]) -> Pairing:
        """Return what was found, and why the others were not."""
        pieces: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
        for place, candidate in self.claims.items():
            first = 0
            for part in candidate.parts:
                rows = part.stop - part.start
                pieces[part.name].append((part.start, Piece(place, first, first + rows)))
                first += rows
        whole = {name: tuple(piece for _, piece in sorted(found)) for name, found in pieces.items()}
        kept = {name: found for name, found in whole.items() if self._covers(name, found)}
        used = {piece.stored for found in kept.values() for piece in found}
        left = {place: self._why(place) for place in places if place not in used}
        return Pairing(kept, left)

    def _covers(self, name: str, found: Sequence[Piece]) -> bool:
        return sum(piece.stop - piece.start for piece in found) == len(self.baseline.parameters[name])

    def _why(self, place: int) -> str:
        if place in self.claims:
            return "rows of a matrix whose others were not found"
        matrix = self.stored[place].matrix
        if any(_shape_of(each, self.baseline) == (matrix.rows, matrix.columns) for each in self._candidates):
            return NOT_ALIKE
        return OTHER_SHAPE

    def _open(self, body: Sequence[int]) -> Iterator[int]:
        return (place for place in body if place not in self.claims)

    def _options(self, place: int) -> list[_Candidate]:
        """Return what a matrix may be by its shape and its layer, if its rows are not another's."""
        matrix = self.stored[place].matrix
        shape, layer = (matrix.rows, matrix.columns), self._layer(place) if self._numbered else None
        near = [each for each in self._candidates if layer in (None, each.layer)]
        fits = [each for each in near if _shape_of(each, self.baseline) == shape]
        for each in near:
            fits += _apart(each, shape, self.baseline)
        taken: dict[str, list[_Part]] = defaultdict(list)
        for part in (part for claim in self.claims.values() for part in claim.parts):
            taken[part.name].append(part)
        return [each for each in fits if not any(_overlap(p, other) for p in each.parts for other in taken[p.name])]

    def _alike(self, place: int, candidate: _Candidate) -> float:
        """Return the least cosine of the first rows of a candidate's parts with what is stored."""
        found, first = [], 0
        for name, start, stop in candidate.parts:
            rows = min(_SAMPLE_ROWS, stop - start)
            ours = self.baseline.parameters[name][start : start + rows].float().cpu()
            theirs = self.peek(place, first, first + rows)
            found.append(float(cosine_similarity(theirs.flatten(), ours.flatten(), dim=0)))
            first += stop - start
        return min(found)

    def _layer(self, place: int) -> int | None:
        found = _LAYER.search(self._text(place))
        return int(found[1]) if found else None

    def _words(self, place: int) -> set[str]:
        return set(re.split(r"[./:\s]", self._text(place)))

    def _text(self, place: int) -> str:
        matrix, parts = self.stored[place]
        return f"{matrix.node} {parts.node.metadata_props.get(_SCOPES, '')} {matrix.weight}".replace("'", " ")


def _of_group(group: Group, baseline: BaselineWeights) -> Iterator[_Candidate]:
    """Yield the linears of a group, and runs of them as one."""
    names = [name for name in group.names if not is_expert(name)]
    parts = [_Part(name, 0, len(baseline.parameters[name])) for name in names]
    for part in parts:
        yield _Candidate(group.layer, _leaf(part.name), (part,))
    for first, last in combinations(range(len(parts)), 2):
        run = tuple(parts[first : last + 1])
        label = "".join(_leaf(part.name).removesuffix("proj") for part in run)
        joined = label.replace("_", "") if len(label) <= 2 * len(run) else label.removesuffix("_")
        yield _Candidate(group.layer, f"{joined}_proj", run)


def _apart(candidate: _Candidate, shape: tuple[int, int], baseline: BaselineWeights) -> Iterator[_Candidate]:
    """Yield the rows of a linear that are gate or up, or queries, keys or values, of a stored matrix's shape."""
    rows, columns = shape
    whole, width = _shape_of(candidate, baseline)
    if len(candidate.parts) > 1 or columns != width or rows >= whole:
        return
    name = candidate.parts[0].name
    starts = {whole - rows: "v_proj", whole - 2 * rows: "k_proj", 0: "q_proj"}
    if "gate" in candidate.label:
        starts = {whole - rows: "up_proj", 0: "gate_proj"}
    for start, label in starts.items():
        if start >= 0:
            part = _Part(name, start, start + rows)
            yield _Candidate(candidate.layer, label, (part,), candidate.label in ("gate_up_proj", "qkv_proj"))


def _in_order(found: Mapping[int, _Candidate]) -> dict[int, _Candidate]:
    """Return what was found by likeness, those of a kind in their layers' order: a layer's matrices follow another's.

    What two are alike is neither's: one of them is in another's place.
    """
    counts = Counter(found.values())
    kinds: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, candidate in sorted(found.items()):
        if counts[candidate] == 1:
            kinds[candidate.label, len(candidate.parts)].append(place)
    ordered: dict[int, _Candidate] = {}
    for places in kinds.values():
        candidates = sorted((found[place] for place in places), key=lambda each: each.layer)
        ordered |= dict(zip(places, candidates, strict=True))
    return ordered


def _shape_of(candidate: _Candidate, baseline: BaselineWeights) -> tuple[int, int]:
    rows = sum(part.stop - part.start for part in candidate.parts)
    return rows, baseline.parameters[candidate.parts[0].name].shape[1]


def _overlap(one: _Part, other: _Part) -> bool:
    return one.start < other.stop and other.start < one.stop


def _leaf(name: str) -> str:
    """Return `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]
