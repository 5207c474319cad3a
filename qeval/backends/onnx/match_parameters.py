"""Match a model's parameters to an exported graph's, by their content, whatever the exporter called them.

An exporter names, transposes, splits and offsets as it likes. Every float initializer is compared with the parameters
themselves; so the same code serves the GenAI builder, torch's exporter and a graph of next year, and a weight that
isn't where it should be is noticed before anything is swapped.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.onnx.matrices import integer

Float32Array = NDArray[np.float32]
Spelled = dict[str, list[list[Any]]]
"""Places by parameter name: initializer, first row, row after the last, transposed, offset."""

_CLOSE = 4e-3
"""Relative: a gain of 1 + weight that was summed in bf16 (half a step is 2^-8), or a whole graph in fp16, is still
that parameter."""
_BLOCK, _BIG_BLOCK = 1 << 12, 1 << 20
_LEAST_ROWS = 16
"""Shorter vectors are constants, not rows of a parameter."""


@dataclass(frozen=True, eq=False)
class MatMulMatrix:
    """A node that multiplies its first input by rows `rows` of a parameter [rows, columns]."""

    node: ir.Node
    rows: slice


@dataclass(frozen=True, eq=False)
class Held:
    """An initializer that holds rows of a parameter, transposed or not, plus an offset (Gemma's gain is 1 + weight)."""

    value: ir.Value
    rows: slice
    transposed: bool
    offset: float

    def of(self, parameter: Float32Array) -> Float32Array:
        """Return what the initializer holds for a parameter's values."""
        part = parameter[self.rows] + np.float32(self.offset)
        return np.ascontiguousarray(part.T if self.transposed else part)


@dataclass
class Places:
    """By parameter name: the nodes that multiply by it, and the initializers that hold it."""

    matrices: dict[str, list[MatMulMatrix]] = field(default_factory=lambda: defaultdict(list))
    held: dict[str, list[Held]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, held: Held) -> None:
        """Note an initializer that holds a parameter, and the products by it."""
        self.held[name].append(held)
        self.matrices[name] += _multiplied(held.value, held.rows, held.transposed)

    def covers(self, name: str, rows: int) -> bool:
        """Return whether the nodes that multiply by a parameter use each of its rows once."""
        spans = sorted((m.rows.start or 0, rows if m.rows.stop is None else m.rows.stop) for m in self.matrices[name])
        edges = [0, *(stop for _, stop in spans)]
        return edges[-1] == rows and [start for start, _ in spans] == edges[:-1]

    def is_shared(self, name: str) -> bool:
        """Return whether an initializer that holds a parameter holds another one too, as that of a tied head does."""
        values = {id(held.value) for held in self.held[name]}
        others = (held for other, all_held in self.held.items() if other != name for held in all_held)
        return any(id(held.value) in values for held in others)

    def spelled(self) -> Spelled:
        """Return the places in plain values, for `read_places`."""
        return {
            name: [
                [held.value.name, held.rows.start, held.rows.stop, held.transposed, held.offset] for held in all_held
            ]
            for name, all_held in self.held.items()
        }


def read_places(graph: ir.Graph, spelled: Spelled) -> Places:
    """Return the places that `Places.spelled` wrote down, in the same graph read again."""
    places = Places()
    for name, entries in spelled.items():
        for initializer, start, stop, transposed, offset in entries:
            places.add(name, Held(graph.initializers[initializer], slice(start, stop), transposed, offset))
    return places


def locate(graph: ir.Graph, parameters: Mapping[str, Tensor]) -> Places:
    """Return the places of `parameters` (by name, of one or two dimensions) in `graph`; two names may be of one tensor.

    What isn't found is left out; whoever needs it says so.
    """
    values = {name: as_floats(tensor) for name, tensor in parameters.items() if tensor.dim() in (1, 2)}
    index = _by_width(values)
    found = [
        (initializer, _candidates(array, index, values))
        for initializer in list(graph.initializers.values())
        if (array := _float_array(initializer)) is not None
    ]
    tensors = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    places = Places()
    for initializer, candidates in _identify(found, tensors):
        for each in candidates:
            places.add(each.name, Held(initializer, each.rows, each.transposed, each.offset))
    return places


def _identify(
    found: Iterable[tuple[ir.Value, list["_Found"]]], tensors: Mapping[str, int]
) -> Iterator[tuple[ir.Value, list["_Found"]]]:
    """Yield each initializer with the parameter it holds (under all its names).

    Several parameters may have the same content, as gains of one in a fresh model do. The one whose name is most like
    the initializer's is taken, the surest first, and none twice; where names don't tell, none is.
    """
    sure: dict[int, set[int]] = {}
    open_ = []
    for initializer, candidates in found:
        wanted = {tensors[each.name] for each in candidates}
        if len(wanted) == 1:
            sure[id(initializer)] = wanted
        elif wanted:
            open_.append((initializer, candidates))
    taken = set().union(*sure.values()) if sure else set()
    for initializer, candidates in sorted(open_, key=lambda pair: -_likeness(pair[0], pair[1])[0][0]):
        free = [pair for pair in _likeness(initializer, candidates) if tensors[pair[1]] not in taken]
        best = {tensors[name] for likeness, name in free if likeness == free[0][0]}
        sure[id(initializer)] = best if len(best) == 1 else set()
        taken |= sure[id(initializer)]
    for initializer, candidates in found:
        wanted = sure.get(id(initializer), set())
        yield initializer, [each for each in candidates if tensors[each.name] in wanted]


def _likeness(initializer: ir.Value, candidates: Iterable["_Found"]) -> list[tuple[float, str]]:
    """Return how alike the names are, 0 to 1, the likest first."""
    words = _words(initializer.name or "")
    names = {each.name for each in candidates}
    shared = {name: len(words & _words(name)) / len(words | _words(name)) for name in names}
    return sorted(((likeness, name) for name, likeness in shared.items()), reverse=True)


def as_floats(tensor: Tensor) -> Float32Array:
    """Return a tensor's values on the CPU as fp32; no copy where it is that already."""
    result: Float32Array = tensor.detach().float().cpu().numpy()
    return result


class _Found(NamedTuple):
    name: str
    rows: slice
    transposed: bool
    offset: float
    whole: bool
    error: float


def _float_array(initializer: ir.Value) -> Float32Array | None:
    tensor = initializer.const_value
    wanted = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if tensor is None or tensor.dtype not in wanted or len(tensor.shape) not in (1, 2):
        return None
    return np.asarray(tensor.numpy(), dtype=np.float32)


def _by_width(values: Mapping[str, Float32Array]) -> dict[int, list[str]]:
    """Parameter names by the columns of a matrix, 0 for vectors."""
    index: dict[int, list[str]] = defaultdict(list)
    for name, value in values.items():
        index[_width(value)].append(name)
    return index


def _width(array: Float32Array) -> int:
    return array.shape[1] if array.ndim == 2 else 0


def _candidates(
    array: Float32Array, index: Mapping[int, list[str]], values: Mapping[str, Float32Array]
) -> list[_Found]:
    """Return the parameters that an initializer may hold: the nearest whole ones, else those it is some rows of."""
    found = []
    for transposed in (True, False) if array.ndim == 2 else (False,):
        part = array.T if transposed else array
        for name in index.get(_width(part), ()):
            for offset in (0.0,) if array.ndim == 2 else (0.0, 1.0):
                if match := _nearest_rows(part, values[name], offset):
                    rows = slice(match.start, match.start + len(part))
                    whole = len(part) == len(values[name])
                    found.append(_Found(name, rows, transposed, offset, whole, match.error))
    found = [each for each in found if each.whole] or found
    best = min((each.error for each in found), default=0.0)
    return [each for each in found if each.error == best]


class _Match(NamedTuple):
    start: int
    error: float


def _nearest_rows(part: Float32Array, whole: Float32Array, offset: float) -> _Match | None:
    """Return the row of `whole` (plus `offset`) where `part` begins, and how far off it is; None without one."""
    starts: Iterable[int] = (0,)
    if len(part) != len(whole):
        if not _LEAST_ROWS <= len(part) < len(whole):
            return None
        first, column = part.flat[0], whole.reshape(len(whole), -1)[: len(whole) - len(part) + 1, 0]
        starts = np.flatnonzero(np.abs(column + offset - first) <= _CLOSE * abs(first))
    matches = (_Match(int(start), _error(part, whole[start : start + len(part)], offset)) for start in starts)
    best = min(matches, key=lambda match: match.error, default=None)
    return best if best is not None and best.error < inf else None


def _error(a: Float32Array, b: Float32Array, offset: float) -> float:
    """Return the largest difference between `a` and `b + offset`, infinite beyond what rounding to fp16 explains.

    A few rows at a time: most pairs differ at once, and a vocabulary's matrix is not copied whole.
    """
    width = max(1, a[0].size)
    worst, start, rows = 0.0, 0, max(1, _BLOCK // width)
    while start < len(a):
        part, expected = a[start : start + rows], b[start : start + rows] + np.float32(offset)
        difference = float(np.abs(part - expected).max(initial=0.0))
        if not difference <= _CLOSE * float(np.abs(expected).max(initial=0.0)):
            return inf
        worst, start, rows = max(worst, difference), start + rows, max(1, _BIG_BLOCK // width)
    return worst


def _multiplied(initializer: ir.Value, rows: slice, transposed: bool) -> Iterator[MatMulMatrix]:
    """Yield the matrix products by an initializer, straight or through a Transpose: `x @ weight.T` in torch's terms."""
    for node, index in initializer.uses():
        if node.op_type == "Transpose":
            yield from _multiplied(node.outputs[0], rows, not transposed)
        elif (node.op_type == "MatMul" and index == 1 and transposed) or (
            node.op_type == "Gemm" and index == 1 and bool(integer(node, "transB", 0)) != transposed
        ):
            yield MatMulMatrix(node, rows)


def _words(name: str) -> set[str]:
    return set(re.split(r"[./_]", name.lower()))
