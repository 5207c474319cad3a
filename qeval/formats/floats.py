"""Small floating-point types: FP4 (E2M1) two a byte, FP8 by torch, and scales for blocks of them. Pure."""

from collections.abc import Sequence

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three low bits of an FP4 code mean; the fourth is the sign (OCP Microscaling Formats 1.0, table 5)."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def fp4(packed: Tensor) -> Tensor:
    """[rows, columns / 2] bytes, the low nibble first, as [rows, columns] fp32.

    >>> fp4(torch.tensor([[0xF1]], dtype=torch.uint8)).tolist()
    [[0.5, -6.0]]
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(len(packed), -1)
    return table[codes.long()]


def powers(exponents: Tensor) -> Tensor:
    """E8M0 scales as fp32: 2 to the power of the byte less 127."""
    return torch.exp2(exponents.float() - 127)


def spread(scales: Tensor, rows: int, columns: int, tile: Sequence[int] | None = None) -> Tensor:
    """Scales of blocks (a tensor, rows, groups, tiles) as [rows, columns], or what broadcasts to it.

    `tile`: rows and columns of a block, the last ones short; equal blocks along a side where their number is another.
    """
    if scales.numel() == 1:
        return scales.float().reshape(1, 1)
    scales = scales.float().reshape(len(scales), -1)
    for dim, size in enumerate((rows, columns)):
        block = _block(size, scales.shape[dim], tile[dim] if tile else 0)
        scales = scales.repeat_interleave(block, dim).narrow(dim, 0, size)
    return scales


def _block(size: int, count: int, asked: int) -> int:
    if asked and -(-size // asked) == count:
        return asked
    block = -(-size // count)
    # tiles are powers of two where the last one is short: ceil(size / count) alone would be too small
    return block if size % count == 0 else 1 << (block - 1).bit_length()
