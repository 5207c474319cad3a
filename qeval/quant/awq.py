"""AWQ: scale up the input channels that matter before rounding, then clip each block's range.

Lin et al., *AWQ: Activation-aware Weight Quantization*, arXiv 2306.00978. The scales are `magnitude^alpha`
with alpha searched on a grid; here the loss is that of all linears that share the input together, and it is measured
on a sketch of the input's second moments, so that a candidate costs the same whatever the number of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.quant.grid import Grid, PerBlock, PerTensor
from qeval.quant.qweight import from_blocks, to_blocks
from qeval.quant.rtn import rounding_error
from qeval.quant.statistics import InputStatistics

ALPHAS = tuple(step / 10 for step in range(11))
CLIPS = tuple(1 - step / 40 for step in range(20))
"""Shares of a block's range that the clip search tries: 1.0 down to 0.525."""

_SHARE, _FEWEST = 8, 64
"""All candidates round an eighth of the rows, at least 64."""
_SURE, _NEAR = 4.0, 0.1
"""Standard errors behind the leader, and share of its loss behind it, beyond which a candidate is out.

In all 120 groups of the demo model, at INT4 in blocks of 128 and per channel, the choice is that of the whole search.
"""
_NUMBERS = 1 << 20
"""Weights, of all candidates together, that are rounded at a time."""
_SMALLEST_MAGNITUDE = 1e-5
_LARGEST_RATIO = 1e3


class ScaleChoice(NamedTuple):
    """The scales [columns] by which a group's input channels are multiplied in the weights, and what they gain."""

    scales: Tensor
    alpha: float
    loss: float  # mean squared error of the group's outputs a token
    plain_loss: float  # the same with all scales 1


def choose_scales(
    weights: Sequence[Tensor],
    grids: Sequence[Grid],
    inputs: InputStatistics,
    magnitude: Tensor | None = None,
) -> ScaleChoice:
    """The scales with the least joint loss of linears [rows_i, columns] that share an input.

    `magnitude` replaces the inputs' own where scales must be constant over tied channels. alpha = 0 (no scaling)
    is among the candidates, so the loss never exceeds plain rounding's.
    """
    candidates = torch.stack([_candidate(inputs.magnitude if magnitude is None else magnitude, a) for a in ALPHAS])
    tried = _losses(weights, grids, inputs.sketch, candidates)
    best = min(tried, key=tried.__getitem__)
    return ScaleChoice(candidates[best], ALPHAS[best], tried[best] / inputs.tokens, tried[0] / inputs.tokens)


def _losses(weights: Sequence[Tensor], grids: Sequence[Grid], sketch: Tensor, candidates: Tensor) -> dict[int, float]:
    """The squared error of all outputs for those of `candidates` [n, columns] that may be the best, by index.

    A race: all candidates round some of the rows, and those that lose to the leader there by more than chance would
    have it (rows are compared one by one) are out; the rest, and the first of all, round the other rows too.
    """
    some, others = zip(*(_parted(weight, grid) for weight, grid in zip(weights, grids, strict=True)), strict=True)
    by_row = torch.cat([_row_losses(*each, sketch, candidates) for each in zip(some, grids, strict=True)], dim=1)
    sums = by_row.sum(1)
    behind = by_row - by_row[sums.argmin()]
    chance = behind.std(1) * by_row.shape[1] ** 0.5
    inside = behind.sum(1) <= torch.maximum(_SURE * chance, _NEAR * sums.min())
    inside[0] = True
    left = inside.nonzero().flatten()
    rest = [_row_losses(*each, sketch, candidates[left]).sum(1) for each in zip(others, grids, strict=True)]
    totals = sums[left] + torch.stack(rest).sum(0)
    return dict(zip(left.tolist(), totals.tolist(), strict=True))


def _parted(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rows that all candidates round, spread evenly, and the other rows; all at once where one scale spans them."""
    count = len(weight) if isinstance(grid.granularity, PerTensor) else max(len(weight) // _SHARE, _FEWEST)
    chosen = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    chosen[torch.linspace(0, len(weight) - 1, min(count, len(weight)), device=weight.device).long()] = True
    return weight[chosen], weight[~chosen]


def _row_losses(weight: Tensor, grid: Grid, sketch: Tensor, candidates: Tensor) -> Tensor:
    """The squared error of each row's output when `weight * candidate` is rounded, [candidates, rows] fp64.

    All candidates go through one product, as many rows at a time as stay in the cache.
    """
    found = []
    for part in _few_rows(weight, grid, _NUMBERS // len(candidates)) if len(weight) else ():
        errors = torch.stack([_error(part * scales, grid).div_(scales) for scales in candidates])
        found.append((errors @ sketch.T).square_().sum(-1, dtype=torch.float64))
    return torch.cat(found, dim=1) if found else candidates.new_zeros(len(candidates), 0, dtype=torch.float64)


def choose_clip(weight: Tensor, grid: Grid, sketch: Tensor | None) -> Tensor:
    """The share of its range that each block keeps, of the scales' shape, with the least loss of its own output.

    `sketch` [k, columns]: S with S^T S the input's second moments, up to a factor. Without it all columns count
    alike: the least squared error of the weights themselves.
    """
    moments = None if sketch is None else _block_moments(sketch, grid)
    return torch.cat([_clip_rows(part, grid, moments) for part in _few_rows(weight, grid, _NUMBERS // 2)])


def _clip_rows(weight: Tensor, grid: Grid, moments: Tensor | None) -> Tensor:
    blocks = to_blocks(weight, grid)
    best_loss = torch.full(grid.scale_shape(*weight.shape), torch.inf, device=weight.device)
    best = torch.ones_like(best_loss)
    for clip in CLIPS:
        loss = _clip_loss(rounding_error(blocks, grid, torch.full_like(best, clip)), moments, weight, grid)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = best.masked_fill(better, clip)
    return best


def _few_rows(weight: Tensor, grid: Grid, numbers: int) -> Sequence[Tensor]:
    """`weight` in parts of about `numbers` weights, or whole where one scale spans it."""
    if isinstance(grid.granularity, PerTensor):
        return (weight,)
    return torch.split(weight, max(1, numbers // weight.shape[1]))


def _candidate(magnitude: Tensor, alpha: float) -> Tensor:
    scales = magnitude.clamp(min=_SMALLEST_MAGNITUDE).pow(alpha)
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)


def _error(weight: Tensor, grid: Grid) -> Tensor:
    return from_blocks(rounding_error(to_blocks(weight, grid), grid), *weight.shape)


def _block_moments(sketch: Tensor, grid: Grid) -> Tensor:
    """The second moments within each block, [blocks, size, size]; those of the whole row where a scale spans it."""
    wide = to_blocks(sketch, grid) if isinstance(grid.granularity, PerBlock) else sketch[:, None]
    by_block = wide.transpose(0, 1)
    return by_block.mT @ by_block


def _clip_loss(errors: Tensor, moments: Tensor | None, weight: Tensor, grid: Grid) -> Tensor:
    """The loss of each scale's own weights, of the scales' shape, from errors [rows, blocks, size]."""
    shape = grid.scale_shape(*weight.shape)
    if moments is None:
        return errors.square().sum(-1).reshape(shape)
    by_row = errors.reshape(len(weight), len(moments), -1).transpose(0, 1)  # [blocks, rows, size]
    loss = (by_row @ moments).mul_(by_row).sum(-1).T
    return loss if loss.shape == shape else loss.sum().reshape(shape)
