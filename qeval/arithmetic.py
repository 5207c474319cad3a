"""Types and sizes of arithmetic that depend on the device: fp64, which Apple's MPS lacks, and pieces of work."""

import torch
from torch import Tensor

_STRIP = 256
"""Numbers that are summed in fp32 where there is no fp64."""


GPU_NUMBERS = 1 << 26
"""Numbers that are worked on at a time on a GPU: 256 MiB in fp32. Each piece costs launches, whatever its size."""


def piece(numbers: int, device: torch.device) -> int:
    """Return how many numbers to work on at a time: `numbers` on the CPU, where they should lie in its caches."""
    return numbers if device.type == "cpu" else GPU_NUMBERS


def dtype_name(dtype: torch.dtype) -> str:
    """Return a type's name as torch's users write it.

    >>> dtype_name(torch.float16)
    'float16'
    """
    return str(dtype).removeprefix("torch.")


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Return the type that sums over tokens or rows are made in on a device: fp64, and fp32 on MPS."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def with_fp64(values: Tensor) -> Tensor:
    """Return `values` where fp64 can be computed with: on their device, or on the CPU where MPS holds them."""
    return values.cpu() if values.device.type == "mps" else values


def wide_total(values: Tensor) -> float:
    """Sum all of `values` in fp64."""
    return float(with_fp64(values).sum(dtype=torch.float64))


def row_sums(values: Tensor) -> Tensor:
    """Sum the rows of `values` [n, width] in fp64; [n] fp64, on their device (of MPS: on the CPU).

    On MPS short strips are summed in fp32, and their sums in fp64 on the CPU.
    """
    if values.device.type != "mps":
        return values.sum(-1, dtype=torch.float64)
    strips = [strip.sum(-1).cpu() for strip in torch.split(values, _STRIP, dim=-1)]
    return torch.stack(strips, dim=-1).sum(-1, dtype=torch.float64)
