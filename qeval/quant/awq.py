"""AWQ: scale up the input channels that matter before rounding, then clip each block's range.

Lin et al., *AWQ: Activation-aware Weight Quantization*, arXiv 2306.00978. The scales are `magnitude^alpha`
with alpha searched on a grid; here the loss is that of all linears that share the input together, and it is measured
on a sketch of the input's second moments, so that a candidate costs the same whatever the number of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.quant.grid import Grid, PerBlock
from qeval.quant.qweight import from_blocks, to_blocks
from qeval.quant.rtn import rounding_error
from qeval.quant.statistics import InputStatistics

ALPHAS = tuple(step / 10 for step in range(11))
CLIPS = tuple(1 - step / 40 for step in range(20))
"""Shares of a block's range that the clip search tries: 1.0 down to 0.525."""

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
    candidates = [_candidate(inputs.magnitude if magnitude is None else magnitude, alpha) for alpha in ALPHAS]
    losses = [output_loss(weights, grids, inputs, scales) for scales in candidates]
    best = min(range(len(losses)), key=losses.__getitem__)
    return ScaleChoice(candidates[best], ALPHAS[best], losses[best], losses[0])


def output_loss(weights: Sequence[Tensor], grids: Sequence[Grid], inputs: InputStatistics, scales: Tensor) -> float:
    """Mean over tokens of the squared error of all outputs when `weights * scales` are rounded."""
    sketch = (inputs.sketch / scales).T
    errors = (_error(weight * scales, grid) @ sketch for weight, grid in zip(weights, grids, strict=True))
    return sum(float(error.square().sum(dtype=torch.float64)) for error in errors) / inputs.tokens


def choose_clip(weight: Tensor, grid: Grid, sketch: Tensor | None) -> Tensor:
    """The share of its range that each block keeps, of the scales' shape, with the least loss of its own output.

    `sketch` [k, columns]: S with S^T S the input's second moments, up to a factor. Without it all columns count
    alike: the least squared error of the weights themselves.
    """
    blocks = to_blocks(weight, grid)
    shape = grid.scale_shape(*weight.shape)
    moments = None if sketch is None else _block_moments(sketch, grid)
    best_loss = torch.full(shape, torch.inf, device=weight.device)
    best = torch.ones(shape, device=weight.device)
    for clip in CLIPS:
        loss = _clip_loss(rounding_error(blocks, grid, torch.full_like(best, clip)), moments, weight, grid)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = best.masked_fill(better, clip)
    return best


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
