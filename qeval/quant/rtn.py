"""Round to nearest: each block's range decides its scale, each weight goes to the nearest value of the grid."""

from typing import NamedTuple

import torch
from torch import Tensor

from qeval.quant.grid import Grid
from qeval.quant.qweight import QWeight, from_blocks, to_blocks

_TINY = 1e-30  # below it `qmax / amax` would overflow; such a block is all zeros


class Steps(NamedTuple):
    """The values that each block may take, of the scales' shape: `scales * (code - zeros)`; `inverse` is 1 / scales.

    Zero points are in fp32. In a block of zeros `inverse` is 0, so that all codes are the zero point.
    """

    inverse: Tensor
    scales: Tensor
    zeros: Tensor


def steps_of(blocks: Tensor, grid: Grid, clip: Tensor | None = None) -> Steps:
    """The steps that the ranges of `blocks` [rows, blocks, size] ask for, shrunk by `clip`."""
    return _symmetric(blocks, grid, clip) if grid.symmetric else _asymmetric(blocks, grid, clip)


def quantize(weight: Tensor, grid: Grid, clip: Tensor | None = None) -> QWeight:
    """`weight` [rows, columns] fp32 rounded to the nearest value of `grid`.

    `clip`, of the scales' shape with values in (0, 1], shrinks each block's range; weights outside it saturate.
    """
    rows, columns = weight.shape
    blocks = to_blocks(weight, grid)
    steps = steps_of(blocks, grid, clip)
    codes = _round(blocks, steps, grid).to(torch.uint8)
    return packed(from_blocks(codes, rows, columns).contiguous(), steps, grid)


def packed(codes: Tensor, steps: Steps, grid: Grid) -> QWeight:
    """The quantized matrix of `codes` [rows, columns] uint8 on `steps`."""
    return QWeight(grid, codes, steps.scales, None if grid.symmetric else steps.zeros.to(torch.uint8))


def rounding_error(blocks: Tensor, grid: Grid, clip: Tensor | None = None) -> Tensor:
    """dequantized - original of `blocks` [rows, blocks, size], without making the integers; the same arithmetic."""
    steps = steps_of(blocks, grid, clip)
    codes = _round(blocks, steps, grid)
    return codes.sub_(steps.zeros.unsqueeze(-1)).mul_(steps.scales.unsqueeze(-1)).sub_(blocks)


def _round(blocks: Tensor, steps: Steps, grid: Grid) -> Tensor:
    codes = (blocks * steps.inverse.unsqueeze(-1)).round_()
    return codes.add_(steps.zeros.unsqueeze(-1)).clamp_(0, grid.levels)


def _symmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> Steps:
    low, high = blocks.aminmax(dim=-1)
    amax = torch.maximum(-low, high)
    amax = amax if clip is None else amax * clip
    inverse, scales = _inverse_and_scale(amax, grid.zero - 1)
    return Steps(inverse, scales, torch.full_like(scales, grid.zero))


def _asymmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> Steps:
    low, high = blocks.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        low, high = low * clip, high * clip
    inverse, scales = _inverse_and_scale(high - low, grid.levels)
    return Steps(inverse, scales, (-low * inverse).round_().clamp_(0, grid.levels))


def _inverse_and_scale(width: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    empty = width < _TINY
    width = width.masked_fill(empty, 1.0)
    number = torch.full_like(width, steps)
    return (number / width).masked_fill(empty, 0.0), width / number
