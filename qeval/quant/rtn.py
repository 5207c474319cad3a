"""Round to nearest: each block's range decides its scale, each weight goes to the nearest value of the grid."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.quant.grid import Grid, PerTensor
from qeval.quant.qweight import QWeight, from_blocks, to_blocks

_TINY = 1e-30  # below it `qmax / amax` would overflow; such a block is all zeros
_NUMBERS = 1 << 18
"""Weights that are rounded at a time: 1 MiB of them."""


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
    return _on(steps_of(to_blocks(weight, grid), grid, clip), weight, grid)


def quantize_by_rows(parts: Callable[[], Iterable[Tensor]], grid: Grid) -> Iterator[QWeight]:
    """A matrix whose rows come in `parts`, part by part: one below the other they are what `quantize` makes of it.

    Where one scale spans the matrix its parts are asked for twice, and each comes out with that scale.
    """
    one = isinstance(grid.granularity, PerTensor)
    steps = steps_of(torch.cat([_ends(part) for part in parts()]).reshape(1, 1, -1), grid) if one else None
    for part in parts():
        yield quantize(part, grid) if steps is None else _on(steps, part, grid)


def _ends(part: Tensor) -> Tensor:
    return torch.stack([part.amin(), part.amax()])


def _on(steps: Steps, weight: Tensor, grid: Grid) -> QWeight:
    """A few rows are rounded at a time, so that what lies between weights and codes stays in the cache."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    few = max(1, _NUMBERS // weight.shape[1])
    for start in range(0, len(weight), few):
        part = weight[start : start + few]
        own = steps if len(steps.scales) == 1 else Steps(*(each[start : start + few] for each in steps))
        codes[start : start + few] = from_blocks(_round(to_blocks(part, grid), own, grid), *part.shape)
    return packed(codes, steps, grid)


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
    low, high = _range(blocks)
    amax = torch.maximum(-low, high)
    amax = amax if clip is None else amax * clip
    inverse, scales = _inverse_and_scale(amax, grid.zero - 1)
    return Steps(inverse, scales, torch.full_like(scales, grid.zero))


def _asymmetric(blocks: Tensor, grid: Grid, clip: Tensor | None) -> Steps:
    low, high = _range(blocks)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        low, high = low * clip, high * clip
    inverse, scales = _inverse_and_scale(high - low, grid.levels)
    return Steps(inverse, scales, (-low * inverse).round_().clamp_(0, grid.levels))


def _range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each block, in two passes: torch's `aminmax` takes 15 times as long."""
    return blocks.amin(dim=-1), blocks.amax(dim=-1)


def _inverse_and_scale(width: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    empty = width < _TINY
    width = width.masked_fill(empty, 1.0)
    number = torch.full_like(width, steps)
    return (number / width).masked_fill(empty, 0.0), width / number
