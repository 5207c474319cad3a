"""Codes of 2 to 8 bits packed without gaps, the lowest bits first, each row on a whole byte."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack [rows, columns] codes below 2^bits into [rows, ceil(columns * bits / 8)] bytes.

    >>> pack(np.array([[1, 2, 15]], dtype=np.uint8), 4).tolist()
    [[33, 15]]
    """
    rows, columns = codes.shape
    if bits == 8:
        return codes
    if 8 % bits == 0:
        return _pack_even(codes, bits)
    spread = np.unpackbits(codes.reshape(rows, columns, 1), axis=-1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(rows, columns * bits), axis=-1, bitorder="little")


def unpack(packed: Bytes, bits: int, columns: int) -> Bytes:
    """Return the [rows, columns] codes that `pack` made `packed` of."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        return _unpack_even(packed, bits)[:, :columns]
    spread = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
    return np.packbits(spread.reshape(len(packed), columns, bits), axis=-1, bitorder="little")[..., 0]


def pack_tensor(codes: Tensor, bits: int) -> Tensor:
    """As `pack`, of a uint8 tensor on its device."""
    if codes.device.type == "cpu":
        return torch.from_numpy(pack(codes.numpy(), bits))
    if bits == 8:
        return codes
    digits = (codes.unsqueeze(-1) >> _places(bits, codes.device)) & 1
    row = digits.reshape(len(codes), -1)
    filled = torch.nn.functional.pad(row, (0, -row.shape[1] % 8)).reshape(len(codes), -1, 8)
    return (filled << _places(8, codes.device)).sum(-1, dtype=torch.uint8)


def unpack_tensor(packed: Tensor, bits: int, columns: int) -> Tensor:
    """As `unpack`, of a uint8 tensor on its device."""
    if packed.device.type == "cpu":
        return torch.from_numpy(unpack(packed.numpy(), bits, columns).copy())
    if bits == 8:
        return packed
    digits = ((packed.unsqueeze(-1) >> _places(8, packed.device)) & 1).reshape(len(packed), -1)
    codes = digits[:, : columns * bits].reshape(len(packed), columns, bits)
    return (codes << _places(bits, packed.device)).sum(-1, dtype=torch.uint8)


def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=device)


def _pack_even(codes: Bytes, bits: int) -> Bytes:
    """Pack codes of which a byte holds a whole number: ten times faster than bit by bit."""
    count = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % count)))
    packed = padded[:, ::count].copy()
    for place in range(1, count):
        packed |= padded[:, place::count] << np.uint8(bits * place)
    return packed


def _unpack_even(packed: Bytes, bits: int) -> Bytes:
    count, mask = 8 // bits, np.uint8((1 << bits) - 1)
    codes = np.empty((*packed.shape, count), dtype=np.uint8)
    for place in range(count):
        np.bitwise_and(packed >> np.uint8(bits * place), mask, out=codes[..., place])
    return codes.reshape(len(packed), -1)
