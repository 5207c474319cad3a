"""SmoothQuant: outliers of activations moved into the weights, where rounding by row takes less harm from them.

Xiao et al., *SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models*, arXiv
2211.10438, equation 4: each input channel is divided by `max|X|^alpha / max|W|^(1-alpha)`, and the weights' columns are
multiplied by it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-5
"""Of the weights' magnitudes and of a scale, as in the authors' code."""


def smooth_scales(weights: Sequence[Tensor], largest: Tensor, alpha: float, repeat: int = 1, head: int = 1) -> Tensor:
    """Return what the input channels of linears are divided by, and their columns multiplied by.

    Args:
        weights: The matrices that share the input, each [rows_i, columns].
        largest: [columns], the largest magnitude of each channel on calibration text; channels of 0 are left alone.
        alpha: The share of the outliers that the weights take.
        repeat: How many runs of channels one run of the producer's rows feeds (grouped queries): they get one scale.
        head: The channels of a run.

    Returns:
        [columns], fp32.
    """
    columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    columns, inputs = (_tied(each, repeat, head) for each in (columns, largest.float()))
    scales = inputs.pow(alpha) / columns.clamp(min=_SMALLEST).pow(1 - alpha)
    return torch.where(inputs > 0, scales.clamp(min=_SMALLEST), 1.0)


def _tied(values: Tensor, repeat: int, head: int) -> Tensor:
    """Return the largest of the channels that one row feeds, for each of them."""
    if repeat == 1:
        return values
    runs = values.reshape(-1, repeat, head)
    return runs.amax(1, keepdim=True).expand_as(runs).reshape(-1)
