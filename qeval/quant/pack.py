"""Codes of 2 to 8 bits packed without gaps, the lowest bits first, each row on a whole byte."""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack(codes: Bytes, bits: int) -> Bytes:
    """[rows, columns] codes below 2^bits as [rows, ceil(columns * bits / 8)] bytes.

    >>> pack(np.array([[1, 2, 15]], dtype=np.uint8), 4).tolist()
    [[33, 15]]
    """
    rows, columns = codes.shape
    if bits == 8:
        return codes
    spread = np.unpackbits(codes.reshape(rows, columns, 1), axis=-1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(rows, columns * bits), axis=-1, bitorder="little")


def unpack(packed: Bytes, bits: int, columns: int) -> Bytes:
    """The inverse of `pack`: [rows, columns] codes."""
    if bits == 8:
        return packed
    spread = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
    return np.packbits(spread.reshape(len(packed), columns, bits), axis=-1, bitorder="little")[..., 0]
