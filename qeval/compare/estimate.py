"""What a run will cost, before it is paid: seconds from counted operations and a measured rate, bytes from sizes."""

import time
from dataclasses import dataclass

import torch

_SIDE = 1024
_SHARE_OF_PEAK = 0.6
"""What whole forward passes reach of a large matrix product's rate; attention and norms take the rest."""

PROGRAM_BYTES = 1 << 30
"""Resident memory of the program and its libraries, with some working memory."""


@dataclass(frozen=True)
class Cost:
    """An estimate: seconds of the whole work, and the largest resident memory in bytes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Shape:
    """What a model's cost depends on: matrix weights inside its layers, and its head's [vocab, d_model]."""

    layer_weights: int
    head_weights: int
    parameters: int
    bytes_per_parameter: int

    def forward_flops(self, tokens: int, scored: int) -> float:
        """Operations of a forward pass over `tokens` with `scored` positions through the head."""
        return 2.0 * (self.layer_weights * tokens + self.head_weights * scored)

    @property
    def model_bytes(self) -> int:
        """Resident weights in the compute type."""
        return self.parameters * self.bytes_per_parameter


def flops_per_second(device: str, dtype: torch.dtype) -> float:
    """The rate of a matrix product of 1024 by 1024 here and now, the best of three."""
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    return 2.0 * _SIDE**3 / min(_seconds(a) for _ in range(3))


def cost(flops: float, rate: float, shape: Shape) -> Cost:
    """The cost of `flops` at a share of the measured `rate`: the model, one variant, and working memory."""
    return Cost(flops / (rate * _SHARE_OF_PEAK), shape.model_bytes * 3 // 2 + PROGRAM_BYTES)


def _seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    result = a @ a
    float(result[0, 0])  # waits for the device
    return time.perf_counter() - start
