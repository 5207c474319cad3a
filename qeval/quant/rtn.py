"""Round to nearest: each block's range decides its scale, each weight goes to the nearest value of the grid."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.arithmetic import piece
from qeval.quant.floats import TINY, block_scales, encode_element, global_scale_of, largest_magnitude, round_to_element
from qeval.quant.grid import FloatGrid, Grid, PerTensor, PerTile, WeightGrid
from qeval.quant.qweight import QWeight, from_blocks, to_blocks
from qeval.quant.tiles import in_row_multiples, over_tiles

_WEIGHTS_AT_ONCE = 1 << 18
"""Weights that are rounded at a time: 1 MiB of them."""


class Steps(NamedTuple):
    """The values that each block may take, of the scales' shape: `scales * (point - zeros)`; `inverse` is 1 / scales.

    A point is a code of an integer grid, or a value of a float grid's element, where `zeros` are 0. Zero points are in
    fp32. In a block of zeros `inverse` is 0 on an integer grid, so that all codes are the zero point. `global_scale`
    [1, 1] is that of a float grid that has one.
    """

    inverse: Tensor
    scales: Tensor
    zeros: Tensor
    global_scale: Tensor | None = None

    def of_rows(self, rows: slice) -> "Steps":
        """Return the steps of some rows; those of a single row serve all."""
        if len(self.scales) == 1:
            return self
        return Steps(self.inverse[rows], self.scales[rows], self.zeros[rows], self.global_scale)


def steps_of(blocks: Tensor, grid: WeightGrid, clip: Tensor | None = None, matrix_amax: Tensor | None = None) -> Steps:
    """Return the steps for the ranges of `blocks` [rows, blocks, size], shrunk by `clip`.

    Args:
        blocks: All of a matrix where the grid's scales span rows.
        grid: The grid.
        clip: Of the scales' shape.
        matrix_amax: The largest magnitude of the whole matrix, where `blocks` are only some rows of it.
    """
    if isinstance(grid, FloatGrid):
        return _float_steps(blocks, grid, clip, matrix_amax)
    return _symmetric(blocks, grid, clip) if grid.symmetric else _asymmetric(blocks, grid, clip)


def quantize_rtn(weight: Tensor, grid: WeightGrid, clip: Tensor | None = None) -> QWeight:
    """Round a matrix to the nearest values of a grid.

    Args:
        weight: [rows, columns] fp32.
        grid: Its grid.
        clip: Of the scales' shape with values in (0, 1]: shrinks the range of each block; weights outside saturate.
    """
    return _round_on(steps_of(to_blocks(weight, grid), grid, clip), weight, grid)


def quantize_by_rows(parts: Callable[[], Iterable[Tensor]], grid: WeightGrid) -> Iterator[QWeight]:
    """Quantize a matrix whose rows come in parts; one below the other, the results are those of `quantize_rtn`.

    Args:
        parts: Gives the parts [rows_i, columns]. It is called twice where one scale spans the matrix, and each result
            has that scale.
        grid: The grid of the matrix. Rows of one tile come together, whatever the parts.
    """
    steps = amax = None
    if isinstance(grid.granularity, PerTensor) or (isinstance(grid, FloatGrid) and grid.has_global_scale):
        # what spans the matrix comes from the least and the largest weight of every part
        ends = torch.cat([torch.stack([part.amin(), part.amax()]) for part in parts()])
        amax = ends.abs().amax()
        steps = steps_of(ends.reshape(1, 1, -1), grid) if isinstance(grid.granularity, PerTensor) else None
    size = grid.granularity.size if isinstance(grid.granularity, PerTile) else 1
    for part in in_row_multiples(parts(), size):
        yield _round_on(steps or steps_of(to_blocks(part, grid), grid, matrix_amax=amax), part, grid)


def _round_on(steps: Steps, weight: Tensor, grid: WeightGrid) -> QWeight:
    """Round a few rows at a time, so that what lies between weights and codes stays in the cache."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    count = max(1, piece(_WEIGHTS_AT_ONCE, weight.device) // weight.shape[1])
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        part = weight[rows]
        points = _round(to_blocks(part, grid), steps.of_rows(rows), grid)
        codes[rows] = from_blocks(encode_points(points, grid), *part.shape)
    return qweight_of(codes, steps, grid)


def encode_points(points: Tensor, grid: WeightGrid) -> Tensor:
    """Return the codes, uint8, of points in fp32; see `Steps`."""
    return encode_element(points, grid.element) if isinstance(grid, FloatGrid) else points.to(torch.uint8)


def qweight_of(codes: Tensor, steps: Steps, grid: WeightGrid) -> QWeight:
    """Return the quantized matrix of `codes` [rows, columns] uint8 on `steps`."""
    zeros = None if grid.symmetric else steps.zeros.to(torch.uint8)
    return QWeight(grid, codes, steps.scales, zeros, steps.global_scale)


def rounding_error(blocks: Tensor, grid: WeightGrid, clip: Tensor | None = None) -> Tensor:
    """Return dequantized - original of `blocks` [rows, blocks, size], by the same arithmetic, without the integers."""
    steps = steps_of(blocks, grid, clip)
    codes = _round(blocks, steps, grid)
    return codes.sub_(steps.zeros.unsqueeze(-1)).mul_(steps.scales.unsqueeze(-1)).sub_(blocks)


def _round(blocks: Tensor, steps: Steps, grid: WeightGrid) -> Tensor:
    if isinstance(grid, FloatGrid):
        return round_scaled(blocks, steps.inverse.unsqueeze(-1), steps.scales.unsqueeze(-1), grid)
    codes = (blocks * steps.inverse.unsqueeze(-1)).round_()
    return codes.add_(steps.zeros.unsqueeze(-1)).clamp_(0, grid.levels)


def round_scaled(values: Tensor, inverse: Tensor, scales: Tensor, grid: FloatGrid) -> Tensor:
    """Return the points of a float grid that are nearest to `values`; `inverse` and `scales` broadcast to them."""
    return round_to_element(values * inverse if grid.multiplies else values / scales, grid.element)


def _float_steps(blocks: Tensor, grid: FloatGrid, clip: Tensor | None, matrix_amax: Tensor | None) -> Steps:
    amax = largest_magnitude(blocks)
    whole = global_scale_of(amax.amax() if matrix_amax is None else matrix_amax, grid.element, grid.scaling)
    amax = amax if clip is None else amax * clip
    if isinstance(grid.granularity, PerTile):
        amax = over_tiles(amax, grid.granularity.size, torch.amax)
    scales = block_scales(blocks, amax, grid.element, grid.scaling, whole)
    inverse = scales.reciprocal()
    if grid.multiplies:  # Model Optimizer's `448 / amax`, which torch evaluates as a reciprocal times the number
        inverse = amax.masked_fill(amax < TINY, 1.0).reciprocal() * grid.element.largest
    return Steps(inverse, scales, torch.zeros_like(scales), None if whole is None else whole.reshape(1, 1))


def _symmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> Steps:
    low, high = _range(blocks)
    below, span = -low, grid.span or grid.default_span
    # signed: the weight with the largest magnitude goes to the lowest code; of two as large the negative one
    width = torch.where(below >= high, below, -high) if span == "signed" else torch.maximum(below, high)
    width = width if clip is None else width * clip
    inverse, scales = inverse_and_scale(width, grid.zero - {"full": 1, "half": 0.5, "signed": 0}[span])
    return Steps(inverse, scales, torch.full_like(scales, grid.zero))


def _asymmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> Steps:
    low, high = _range(blocks)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        low, high = low * clip, high * clip
    inverse, scales = inverse_and_scale(high - low, grid.levels)
    return Steps(inverse, scales, (-low * inverse).round_().clamp_(0, grid.levels))


def _range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest weight of each block; in two passes, as `aminmax` takes 15 times as long."""
    return blocks.amin(dim=-1), blocks.amax(dim=-1)


def inverse_and_scale(width: Tensor, steps: float) -> tuple[Tensor, Tensor]:
    """Return `steps / width` and `width / steps` of ranges, by true divisions; 0 and some number for one of zeros.

    A negative width gives a negative scale.
    """
    empty = width.abs() < TINY
    width = width.masked_fill(empty, 1.0)
    number = torch.full_like(width, steps)
    return (number / width).masked_fill(empty, 0.0), width / number
