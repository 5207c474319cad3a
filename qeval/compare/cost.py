"""The cost of a run before it is paid: seconds from counted operations and a measured rate, bytes from sizes."""

import time
from dataclasses import dataclass

import torch

_CPU_SIDE, _GPU_SIDE = 1024, 8192
"""The sides of the product that is timed: on a GPU a small one shows the launch's time, not the arithmetic's."""
_SHARE_OF_PEAK = 0.6
"""What whole forward passes reach of a large matrix product's rate; attention and norms take the rest."""

WORKING_BYTES = 3 << 30
"""What a GPU holds beside the model: a batch's activations, two blocks of logits, statistics."""
PROGRAM_BYTES = 1 << 30
"""Resident memory of the program and its libraries, with some working memory."""


@dataclass(frozen=True)
class Cost:
    """An estimate: seconds of the whole work, and the largest memory in bytes, of the host and of the GPU (0: none)."""

    seconds: float
    peak_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Shape:
    """The sizes that a model's cost depends on: matrix weights inside its layers, and its head's [vocab, d_model]."""

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
    """Return the rate of a large matrix product here and now: the best of three, after one that warms up."""
    side = _CPU_SIDE if torch.device(device).type == "cpu" else _GPU_SIDE
    a = torch.ones(side, side, device=device, dtype=dtype)
    _seconds(a)
    return 2.0 * side**3 / min(_seconds(a) for _ in range(3))


def cost(flops: float, rate: float, shape: Shape, *, on_gpu: bool = False) -> Cost:
    """Return the cost of `flops` at a share of the measured `rate`: the model, one variant, and working memory.

    On a GPU the model and its work lie there; the host keeps the originals of what a variant takes the place of, where
    the GPU lacks room, and a variant's codes.
    """
    seconds, held = flops / (rate * _SHARE_OF_PEAK), shape.model_bytes * 3 // 2 + PROGRAM_BYTES
    return Cost(seconds, held, shape.model_bytes + WORKING_BYTES) if on_gpu else Cost(seconds, held)


def _seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    result = a @ a
    float(result[0, 0])  # waits for the device
    return time.perf_counter() - start
