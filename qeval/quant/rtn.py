"""Round to nearest: each block's range decides its scale, each weight goes to the nearest value of the grid."""

import torch
from torch import Tensor

from qeval.quant.grid import Grid
from qeval.quant.qweight import QWeight, from_blocks, to_blocks

_TINY = 1e-30  # below it `qmax / amax` would overflow; such a block is all zeros


def quantize(weight: Tensor, grid: Grid, clip: Tensor | None = None) -> QWeight:
    """`weight` [rows, columns] fp32 rounded to the nearest value of `grid`.

    `clip`, of the scales' shape with values in (0, 1], shrinks each block's range; weights outside it saturate.
    """
    rows, columns = weight.shape
    blocks = to_blocks(weight, grid)
    inverse, scales, zeros = _symmetric(blocks, grid, clip) if grid.symmetric else _asymmetric(blocks, grid, clip)
    codes = _round(blocks, inverse, zeros, grid).to(torch.uint8)
    return QWeight(
        grid=grid,
        codes=from_blocks(codes, rows, columns).contiguous(),
        scales=scales,
        zeros=None if grid.symmetric else zeros.to(torch.uint8),
    )


def rounding_error(blocks: Tensor, grid: Grid, clip: Tensor | None = None) -> Tensor:
    """dequantized - original of `blocks` [rows, blocks, size], without making the integers; the same arithmetic."""
    inverse, scales, zeros = _symmetric(blocks, grid, clip) if grid.symmetric else _asymmetric(blocks, grid, clip)
    codes = _round(blocks, inverse, zeros, grid)
    return codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(blocks)


def _round(blocks: Tensor, inverse: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    codes = (blocks * inverse.unsqueeze(-1)).round_()
    return codes.add_(zeros.unsqueeze(-1)).clamp_(0, grid.levels)


def _symmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    low, high = blocks.aminmax(dim=-1)
    amax = torch.maximum(-low, high)
    amax = amax if clip is None else amax * clip
    inverse, scales = _inverse_and_scale(amax, grid.zero - 1)
    return inverse, scales, torch.full_like(scales, grid.zero)


def _asymmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    low, high = blocks.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        low, high = low * clip, high * clip
    inverse, scales = _inverse_and_scale(high - low, grid.levels)
    return inverse, scales, (-low * inverse).round_().clamp_(0, grid.levels)


def _inverse_and_scale(width: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    empty = width < _TINY
    width = width.masked_fill(empty, 1.0)
    number = torch.full_like(width, steps)
    return (number / width).masked_fill(empty, 0.0), width / number
