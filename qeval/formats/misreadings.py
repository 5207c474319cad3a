"""A check whether a quantized matrix is the baseline's, and if not, which misreading would make it so. Pure.

The relative error |read - base| / |base| (Frobenius norms) of a matrix on a grid is that of rounding to it,
give or take what a clip or a search moves. Codes in a wrong order give 1.4 (two unrelated matrices of one size); zero
points off by one add a whole step, 3.6 times the error of rounding (uniform: step / sqrt 12). So each plausible
misreading is undone on a few rows, and where that halves the error, it is the cause. A few wrong rows hide in a
matrix's error, so each row's direction is looked at too.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qeval.formats.base import DecodedMatrix, Values
from qeval.quant.grid import Grid, PerBlock, PerTensor, WeightGrid
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_rtn

_SLACK = 4.0
"""By what factor searches (clips, AWQ's scales, GPTQ's order) may exceed the error of rounding to nearest."""
_ADDED = 0.05
"""What a format may lose beyond that: FP8's three bits of fraction lose 0.03."""
_UNRELATED = 1.2
"""From here on two matrices have nothing to do with each other; GPTQ at 2 bits in blocks of 64 reaches 1.01."""
_SAMPLE_ROWS = 64
_HALVED = 0.5
_RESCALED = 0.6
"""Other scales for the same codes leave more than this of the error where they were rounded to nearest, at 2 to 8 bits
(0.87 at least), searched by AWQ (0.90), or made by GPTQ (0.71)."""
_SPREAD = 2.0
"""One factor for all that leaves more than so many times what a factor a block leaves is none for all."""
_NOTHING = 1e-3
"""Errors below this are rounding of scales to half precision."""
_RELATED = 0.8
"""The best scales for codes of another matrix leave more than this of it."""
_STRAY, _NEAR = 0.2, 0.6
"""A row whose cosine with the baseline's is below the first, where rounding's is above the second, is another row."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Resemblance:
    """A matrix's distance from the baseline's, what its bits allow, and the misreading behind it (None: none).

    `strays` are the rows that are nothing like the baseline's, where most are.
    """

    error: float
    allowed: float
    cause: str | None
    strays: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether it can be the baseline's."""
        return self.cause is None and self.error <= self.allowed and not self.strays

    @property
    def words(self) -> str:
        """The fault in words."""
        if self.strays and self.cause is None:
            return f"rows of it are nothing like it, {len(self.strays)} in all, the first of them row {self.strays[0]}"
        cause = f": {self.cause}" if self.cause else ", and no misreading that qeval knows explains it"
        return f"the relative error is {self.error:.2f} where its bits allow {self.allowed:.2f}{cause}"


def compare_matrix(read: DecodedMatrix, base: Tensor, scales: Tensor, head_dim: int | None = None) -> Resemblance:
    """Compare a matrix with the baseline's, once the baseline's columns are multiplied by `scales`.

    Args:
        read: The matrix.
        base: The baseline's, [rows, columns] fp32.
        scales: By what the baseline's columns were multiplied, [columns].
        head_dim: Rows of an attention head, where rotary positions rotate the linear's rows.
    """
    scaled, values = base * scales, values_of(read)
    error = relative_error(values, scaled)
    cause = None
    if error > _NOTHING:
        rows = max(_SAMPLE_ROWS, head_dim or 0)
        few = rows_of(read, 0, rows), scaled[:rows]
        now = relative_error(values_of(few[0]), few[1])
        candidates = [(relative_error(each, target), name) for name, each, target in _misreadings(*few, head_dim)]
        if read_error := min(candidates, default=None):
            cause = read_error[1] if read_error[0] < _HALVED * now else None
        if cause is None and base.shape[0] == base.shape[1] and error > _UNRELATED:
            cause = "it is transposed" if relative_error(values.t(), scaled) < _HALVED * error else None
        if cause is None and error > _ADDED:
            cause = _other_scales(values, scaled, error, _block_of(read))
    return Resemblance(error, allowed_error(read, scaled), cause, _stray_rows(read, values, scaled))


def _block_of(read: DecodedMatrix) -> int:
    return read.grid.block_size(read.codes.shape[1]) if isinstance(read, QWeight) else read.values.shape[1]


def _other_scales(values: Tensor, base: Tensor, error: float, block: int) -> str | None:
    """Return what is wrong with the scales, if others for the same codes would be much nearer; None if nothing."""
    blocks = [
        functional.pad(each, (0, -each.shape[1] % block)).reshape(len(each), -1, block) for each in (values, base)
    ]
    factors = (blocks[0] * blocks[1]).sum(-1) / blocks[0].square().sum(-1).clamp(min=1e-30)
    better = (blocks[0] * factors.unsqueeze(-1)).flatten(1)[:, : base.shape[1]]
    if (left := relative_error(better, base)) > _RESCALED * error or left > _RELATED:
        return None
    times = 1 / max(float(factors.median()), 1e-30)
    if abs(times - 1) < _ADDED or relative_error(values / times, base) > _SPREAD * max(left, _ADDED):
        return "its scales are those of other blocks"
    return f"its scales are {times:.3g} times what its codes need"


def _stray_rows(read: DecodedMatrix, values: Tensor, base: Tensor) -> tuple[int, ...]:
    """Return the rows whose direction is not the baseline's, though rounding to the same grid would keep it.

    None where that is most of them: the whole matrix is another then.
    """
    far = (functional.cosine_similarity(values, base, dim=1) < _STRAY).nonzero().flatten()
    if not len(far):
        return ()
    grid = _grid_of(read, base)
    rounded = quantize_rtn(base, grid).dequantize()[far] if isinstance(grid.granularity, PerTensor) else None
    if rounded is None:
        rounded = quantize_rtn(base[far], grid).dequantize()
    near = functional.cosine_similarity(rounded, base[far], dim=1) > _NEAR
    strays = far[near].tolist()
    return tuple(strays) if 2 * len(strays) < len(base) else ()


def relative_error(values: Tensor, base: Tensor) -> float:
    """Return |values - base| / |base|, 0 where both are zeros; infinite where values are not finite."""
    difference = float(torch.linalg.vector_norm(values.float() - base.float()))
    size = float(torch.linalg.vector_norm(base.float()))
    if math.isnan(difference):
        return math.inf
    return difference / size if size else difference


def allowed_error(read: DecodedMatrix, base: Tensor) -> float:
    """Return the largest relative error that the width of `read` explains, from rounding `base` to it."""
    grid = _grid_of(read, base)
    few = base if isinstance(grid.granularity, PerTensor) else base[:_SAMPLE_ROWS]
    rounded = relative_error(quantize_rtn(few, grid).dequantize(), few)
    return min(_UNRELATED, _SLACK * rounded + _ADDED)


def values_of(read: DecodedMatrix) -> Tensor:
    """Return the matrix, fp32."""
    return read.values.float() if isinstance(read, Values) else read.dequantize()


def _grid_of(read: DecodedMatrix, base: Tensor) -> WeightGrid:
    """Return a matrix's grid, or one of about as many bits as its values take where they are stored."""
    if isinstance(read, QWeight):
        return read.grid
    bits = int(read.size_bits / base.numel())
    return Grid(max(2, min(8, bits)), PerBlock(min(64, base.shape[1])), symmetric=False)


def rows_of(read: DecodedMatrix, start: int, stop: int) -> DecodedMatrix:
    """Return some rows of a matrix, as a matrix."""
    few = slice(start, stop)
    if isinstance(read, Values):
        values = read.values[few]
        return replace(read, values=values, size_bits=read.size_bits * len(values) // max(1, len(read.values)))
    if len(read.scales) == 1 < len(read.codes):
        return replace(read, codes=read.codes[few])
    zeros = None if read.zeros is None else read.zeros[few]
    return replace(read, codes=read.codes[few], scales=read.scales[few], zeros=zeros)


def _misreadings(few: DecodedMatrix, base: Tensor, head_dim: int | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield what the rows would be if one thing had been read otherwise: in words, they, and their target."""
    if head_dim and len(base) >= head_dim:
        rows = len(base) // head_dim * head_dim
        for words, order in (("halves to pairs", (2, -1)), ("pairs to halves", (-1, 2))):
            turned = values_of(few)[:rows].reshape(-1, head_dim, base.shape[1])
            turned = turned.reshape(len(turned), *order, base.shape[1]).transpose(1, 2).reshape(rows, -1)
            yield f"its rows are in the other order of rotary positions ({words})", turned, base[:rows]
    if isinstance(few, QWeight):
        yield from ((words, change(few).dequantize(), base) for words, change in _CHANGES.items())
        for words, rows_of in _row_orders(len(base)):
            yield from ((words, _permute_rows(few, rows_of, zeros=zeros), base) for zeros in (False, True))


def _shift_zeros(step: int) -> Callable[[QWeight], QWeight]:
    """Return what moves zero points by a step: it moves the codes the other way, beyond their range if need be."""

    def change(weight: QWeight) -> QWeight:
        return replace(weight, codes=(weight.codes.to(torch.int16) - step))

    return change


def _swap_nibbles(weight: QWeight) -> QWeight:
    even = weight.codes.shape[1] // 2 * 2
    codes = weight.codes.clone()
    codes[:, :even] = weight.codes[:, :even].reshape(len(codes), -1, 2).flip(-1).reshape(len(codes), -1)
    return replace(weight, codes=codes)


def _flip_signs(weight: QWeight) -> QWeight:
    return replace(weight, codes=weight.codes ^ (1 << (weight.grid.bits - 1)))


_CHANGES: dict[str, Callable[[QWeight], QWeight]] = {
    "its zero points are one too low": _shift_zeros(1),
    "its zero points are one too high": _shift_zeros(-1),
    "its nibbles are swapped along the columns": _swap_nibbles,
    "its codes are signed and were written as unsigned, or the other way round": _flip_signs,
}


def _row_orders(rows: int) -> Iterator[tuple[str, Tensor]]:
    yield "its nibbles are swapped along the rows", torch.arange(rows // 2 * 2).reshape(-1, 2).flip(-1).reshape(-1)
    eights = torch.arange(rows // 8 * 8).reshape(-1, 8)
    order = torch.tensor(_AWQ_ORDER)
    words = "its nibbles are not in AWQ's order (0 2 4 6 1 3 5 7)"
    yield words, eights[:, order].reshape(-1)
    yield words, eights[:, torch.argsort(order)].reshape(-1)


def _permute_rows(weight: QWeight, order: Tensor, *, zeros: bool) -> Tensor:
    """Take codes from other rows, and zero points with them or not; scales are floats and stay."""
    codes, points = weight.codes.clone(), weight.zeros
    codes[: len(order)] = weight.codes[order]
    if zeros and points is not None and len(points) == len(codes):
        points = points.clone()
        points[: len(order)] = points[order]
    return replace(weight, codes=codes, zeros=points).dequantize()
