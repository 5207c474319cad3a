"""Small floating-point types as files hold them: E2M1 two a byte, FP8 by torch, and scales for blocks. Pure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qeval.quant.elements import E2M1
from qeval.quant.floats import decode_element

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def fp4(packed: Tensor) -> Tensor:
    """Return [rows, columns / 2] bytes, the low nibble first, as [rows, columns] fp32.

    >>> fp4(torch.tensor([[0xF1]], dtype=torch.uint8)).tolist()
    [[0.5, -6.0]]
    """
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(len(packed), -1)
    return decode_element(codes, E2M1)


def decode_e8m0(exponents: Tensor) -> Tensor:
    """Return E8M0 scales as fp32: 2 to the power of the byte less 127."""
    return torch.exp2(exponents.float() - 127)


def expand_scales(scales: Tensor, rows: int, columns: int, tile: Sequence[int] | None = None) -> Tensor:
    """Return scales of blocks (a tensor, rows, groups, tiles) as [rows, columns], or what broadcasts to it.

    Args:
        scales: One, or one a row, a group or a tile.
        rows: Of the matrix.
        columns: Of the matrix.
        tile: Rows and columns of a block, the last ones short; equal blocks along a side where their number is another.
    """
    if scales.numel() == 1:
        return scales.float().reshape(1, 1)
    scales = scales.float().reshape(len(scales), -1)
    for dim, size in enumerate((rows, columns)):
        block = _block(size, scales.shape[dim], tile[dim] if tile else 0)
        scales = scales.repeat_interleave(block, dim).narrow(dim, 0, size)
    return scales


def _block(size: int, count: int, wanted: int) -> int:
    if wanted and -(-size // wanted) == count:
        return wanted
    block = -(-size // count)
    # tiles are powers of two where the last one is short: ceil(size / count) alone would be too small
    return block if size % count == 0 else 1 << (block - 1).bit_length()
