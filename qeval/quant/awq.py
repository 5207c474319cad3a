"""AWQ: scale up the input channels that matter before rounding, then clip each block's range.

Lin et al., *AWQ: Activation-aware Weight Quantization*, arXiv 2306.00978. The scales are `magnitude^alpha`
with alpha searched on a grid; here the loss is that of all linears that share the input together, and it is measured
on a sketch of the input's second moments, so that a candidate costs the same whatever the number of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.arithmetic import piece, sum_dtype
from qeval.quant.grid import FloatGrid, PerBlock, PerTile, WeightGrid
from qeval.quant.qweight import from_blocks, to_blocks
from qeval.quant.rtn import rounding_error
from qeval.quant.statistics import InputStatistics
from qeval.quant.tiles import over_tiles

ALPHAS = tuple(step / 10 for step in range(11))
CLIPS = tuple(1 - step / 40 for step in range(20))
"""Shares of a block's range that the clip search tries: 1.0 down to 0.525."""

_RACE_SHARE, _FEWEST_ROWS = 8, 64
"""All candidates round an eighth of the rows, at least 64."""
_STANDARD_ERRORS, _LOSS_SHARE = 4.0, 0.1
"""Standard errors behind the leader, and share of its loss behind it, beyond which a candidate is out.

In all 120 groups of the demo model, at INT4 in blocks of 128 and per channel, the choice is that of the whole search.
"""
_WEIGHTS_AT_ONCE = 1 << 20
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
    grids: Sequence[WeightGrid],
    inputs: InputStatistics,
    magnitude: Tensor | None = None,
) -> ScaleChoice:
    """Return the scales with the least joint loss of linears that share an input.

    alpha = 0 (no scaling) is among the candidates, so the loss never exceeds plain rounding's.

    Args:
        weights: The matrices of the linears, each [rows_i, columns].
        grids: The grid of each.
        inputs: Statistics of the input that they share.
        magnitude: [columns], in place of the mean |x| of the inputs, where scales must be constant over tied channels.
    """
    magnitude = inputs.magnitude if magnitude is None else magnitude
    candidates = torch.stack([_candidate(magnitude, alpha) for alpha in ALPHAS])
    losses = _losses(weights, grids, inputs.sketch, candidates)
    best = min(losses, key=losses.__getitem__)
    return ScaleChoice(candidates[best], ALPHAS[best], losses[best] / inputs.tokens, losses[0] / inputs.tokens)


def _losses(
    weights: Sequence[Tensor], grids: Sequence[WeightGrid], sketch: Tensor, candidates: Tensor
) -> dict[int, float]:
    """Return the squared error of all outputs for those of `candidates` [n, columns] that may be the best, by index.

    It is a race: all candidates round some of the rows, and those that lose to the leader there by more than chance
    would have it (rows are compared one by one) are out; the rest, and the first of all, round the other rows too.
    """
    some, others = zip(*(_split_rows(weight, grid) for weight, grid in zip(weights, grids, strict=True)), strict=True)
    by_row = torch.cat([_row_losses(*each, sketch, candidates) for each in zip(some, grids, strict=True)], dim=1)

    # who is still in: not behind the leader by more than the noise of the rows, nor by more than a small share
    sums = by_row.sum(1)
    behind = by_row - by_row[sums.argmin()]
    noise = behind.std(1) * by_row.shape[1] ** 0.5
    inside = behind.sum(1) <= torch.maximum(_STANDARD_ERRORS * noise, _LOSS_SHARE * sums.min())
    inside[0] = True

    left = inside.nonzero().flatten()
    rest = [_row_losses(*each, sketch, candidates[left]).sum(1) for each in zip(others, grids, strict=True)]
    totals = sums[left] + torch.stack(rest).sum(0)
    return dict(zip(left.tolist(), totals.tolist(), strict=True))


def _split_rows(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Return the rows that all candidates round, spread evenly, and the others; all rows where scales span them."""
    count = len(weight) if grid.spans_rows else max(len(weight) // _RACE_SHARE, _FEWEST_ROWS)
    chosen = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    chosen[torch.linspace(0, len(weight) - 1, min(count, len(weight)), device=weight.device).long()] = True
    return weight[chosen], weight[~chosen]


def _row_losses(weight: Tensor, grid: WeightGrid, sketch: Tensor, candidates: Tensor) -> Tensor:
    """Return the squared error of each row's output when `weight * candidate` is rounded, [candidates, rows].

    All candidates go through one product, as many rows at a time as stay in the cache. Sums are in `sum_dtype`.
    """
    losses, sums = [], sum_dtype(weight.device)
    if isinstance(grid, FloatGrid) and grid.spans_rows:
        # whole matrices: one candidate at a time, as eleven copies of a wide one would not fit into memory
        one_by_one = (_error(weight * scales, grid).div_(scales) for scales in candidates if len(weight))
        losses = [(errors @ sketch.T).square_().sum(-1, dtype=sums) for errors in one_by_one]
        return torch.stack(losses) if losses else candidates.new_zeros(len(candidates), 0, dtype=sums)
    count = piece(_WEIGHTS_AT_ONCE, weight.device) // len(candidates)
    for part in _row_parts(weight, grid, count) if len(weight) else ():
        errors = _candidate_errors(part, grid, candidates)
        losses.append((errors @ sketch.T).square_().sum(-1, dtype=sums))
    return torch.cat(losses, dim=1) if losses else candidates.new_zeros(len(candidates), 0, dtype=sums)


def _candidate_errors(weight: Tensor, grid: WeightGrid, candidates: Tensor) -> Tensor:
    """Return the rounding errors of `weight * candidate / candidate`, [candidates, rows, columns]."""
    if weight.device.type == "cpu" or grid.spans_rows:
        return torch.stack([_error(weight * scales, grid).div_(scales) for scales in candidates])
    # A GPU takes all candidates at once, one matrix below the other: eleven times fewer launches.
    scaled = weight * candidates.unsqueeze(1)
    return _error(scaled.flatten(0, 1), grid).reshape_as(scaled).div_(candidates.unsqueeze(1))


def choose_clip(weight: Tensor, grid: WeightGrid, sketch: Tensor | None) -> Tensor:
    """Return the share of its range that each block keeps with the least loss of its output, of the scales' shape.

    Args:
        weight: The matrix [rows, columns] fp32.
        grid: Its grid.
        sketch: S [k, columns] with S^T S the input's second moments, up to a factor. Without it all columns count
            alike: the least squared error of the weights themselves.
    """
    moments = None if sketch is None else _block_moments(sketch, grid)
    count = piece(_WEIGHTS_AT_ONCE, weight.device) // 2
    return torch.cat([_clip_rows(part, grid, moments) for part in _row_parts(weight, grid, count)])


def _clip_rows(weight: Tensor, grid: WeightGrid, moments: Tensor | None) -> Tensor:
    blocks = to_blocks(weight, grid)
    best_loss = torch.full(grid.scale_shape(*weight.shape), torch.inf, device=weight.device)
    best = torch.ones_like(best_loss)
    for clip in CLIPS:
        loss = _clip_loss(rounding_error(blocks, grid, torch.full_like(best, clip)), moments, weight, grid)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = best.masked_fill(better, clip)
    return best


def _row_parts(weight: Tensor, grid: WeightGrid, count: int) -> Sequence[Tensor]:
    """Split `weight` into parts of about `count` weights; it stays whole where scales span its rows."""
    if grid.spans_rows:
        return (weight,)
    return torch.split(weight, max(1, count // weight.shape[1]))


def _candidate(magnitude: Tensor, alpha: float) -> Tensor:
    scales = magnitude.clamp(min=_SMALLEST_MAGNITUDE).pow(alpha)
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)


def _error(weight: Tensor, grid: WeightGrid) -> Tensor:
    return from_blocks(rounding_error(to_blocks(weight, grid), grid), *weight.shape)


def _block_moments(sketch: Tensor, grid: WeightGrid) -> Tensor:
    """Return the second moments within each block, [blocks, size, size]; a scale that spans a row has one block."""
    shares_columns = isinstance(grid.granularity, PerBlock | PerTile)
    wide = to_blocks(sketch, grid) if shares_columns else sketch[:, None]
    by_block = wide.transpose(0, 1)
    return by_block.mT @ by_block


def _clip_loss(errors: Tensor, moments: Tensor | None, weight: Tensor, grid: WeightGrid) -> Tensor:
    """Return the loss of the weights that share a scale, of the scales' shape, from errors [rows, blocks, size]."""
    shape = grid.scale_shape(*weight.shape)
    if moments is None:
        loss = errors.square().sum(-1).reshape(shape)
    else:
        by_row = errors.reshape(len(weight), len(moments), -1).transpose(0, 1)  # [blocks, rows, size]
        loss = (by_row @ moments).mul_(by_row).sum(-1).T
        loss = loss if loss.shape == shape else loss.sum().reshape(shape)
    return over_tiles(loss, grid.granularity.size, torch.sum) if isinstance(grid.granularity, PerTile) else loss
