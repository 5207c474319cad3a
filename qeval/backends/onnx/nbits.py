"""A `QWeight` in the layout of com.microsoft.MatMulNBits (and of the DequantizeLinear that fuses to it).

Nothing is rounded again: the kernel gets the very codes, scales and zero points of the fake-quantized path. What its
block sizes or widths don't spell is spelled by repetition: a scale of 192 weights as three of 64, one of a row or a
matrix as one for each block, 3-bit codes as 4-bit codes with their own zero point.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qeval.errors import UsageError
from qeval.models.structure.weight_views import is_expert
from qeval.quant.grid import FloatGrid, Grid, PerBlock, WeightGrid
from qeval.quant.pack import Bytes, pack
from qeval.quant.qweight import QWeight

BLOCKS = (256, 128, 64, 32, 16)
"""The block sizes that ONNX Runtime's CPU kernel takes (1.31: others are refused when the model is loaded)."""

_ROW_BLOCKS = (128, 64, 32, 16)
"""Where one scale serves a whole row, the first of these that divides the row is taken, so that none is filled up."""


@dataclass(frozen=True, eq=False)
class NBits:
    """A [rows, columns] matrix as MatMulNBits reads it.

    `codes` [rows, blocks, block] uint8 below 2^bits, the last block filled up with the zero point; `scales`
    [rows, blocks] fp32; `zeros` [rows, blocks] uint8, or None where all are 2^(bits-1), the kernel's default.
    """

    bits: int
    block: int
    columns: int
    codes: Bytes
    scales: NDArray[np.float32]
    zeros: Bytes | None

    @property
    def rows(self) -> int:
        """Output channels."""
        return len(self.codes)

    def packed_codes(self) -> Bytes:
        """Return the operator's input B, [rows, blocks, block * bits / 8], the low bits first along a row."""
        rows, blocks, block = self.codes.shape
        return pack(self.codes.reshape(rows * blocks, block), self.bits).reshape(rows, blocks, -1)

    def packed_zeros(self) -> Bytes | None:
        """Return the operator's input zero_points, [rows, ceil(blocks * bits / 8)], each row on a whole byte."""
        return None if self.zeros is None else pack(self.zeros, self.bits)


def to_nbits(name: str, weight: QWeight, rows: slice = slice(None), block: int | None = None) -> NBits:
    """Return some rows of a weight in the kernel's layout.

    Args:
        name: The weight's name, for the sentence.
        weight: The weight.
        rows: The rows, all by default.
        block: The block size, which divides the grid's; None is the largest that the kernel takes.

    Raises:
        UsageError: the kernel takes no block of the grid's size; the weight is named.
    """
    grid = integers_of(name, weight.grid)
    columns = weight.codes.shape[1]
    block = block or kernel_block(name, grid, columns)
    blocks = -(-columns // block)
    codes = weight.codes[rows].cpu().numpy()
    scales = _spread(weight, weight.scales, rows, block, blocks).astype(np.float32)
    zeros = None if weight.zeros is None else _spread(weight, weight.zeros, rows, block, blocks)
    bits = container_bits(grid)
    if zeros is None and grid.bits != bits:
        zeros = np.full(scales.shape, grid.zero, np.uint8)
    filled = np.empty((len(codes), blocks * block), np.uint8)
    filled[:, :columns] = codes
    filled[:, columns:] = grid.zero if zeros is None else zeros[:, -1:]
    return NBits(bits, block, columns, filled.reshape(len(codes), blocks, block), scales, zeros)


def container_bits(grid: Grid) -> int:
    """Return the width that stores a grid's codes: the kernel has 4 and 8 bits."""
    return 4 if grid.bits <= 4 else 8


def integers_of(name: str, grid: WeightGrid) -> Grid:
    """Return the grid of the weight `name`, which has to be one of integers.

    Raises:
        UsageError: it is one of floats.
    """
    if isinstance(grid, FloatGrid):
        raise UsageError(
            f"ONNX Runtime's MatMulNBits multiplies by integers of 4 or 8 bits, not by {grid} ({name}); take a grid of "
            "integers such as int4-g32, or --backend torch."
        )
    return grid


def kernel_block(name: str, grid: WeightGrid, columns: int) -> int:
    """Return the kernel's block size for a row of `columns` weights of a grid.

    Raises:
        UsageError: the grid is one of floats, or no block that the kernel takes divides the grid's.
    """
    grid = integers_of(name, grid)
    size = grid.block_size(columns)
    if isinstance(grid.granularity, PerBlock) and grid.granularity.size < columns:
        found = next((block for block in BLOCKS if size % block == 0), None)
        if found is None:
            raise UsageError(
                f"ONNX Runtime has no kernel for blocks of {size} ({name} is {grid}): it takes multiples of 16; "
                "choose a group size such as 32 or 128, or --backend torch."
            )
        return found
    return next((block for block in _ROW_BLOCKS if columns % block == 0), _ROW_BLOCKS[0])


def check_kernel(name: str, grid: WeightGrid, columns: int) -> None:
    """Refuse a grid whose codes no kernel reads: MatMulNBits', or for experts QMoE's.

    Raises:
        UsageError: the weight `name`, a matrix of so many columns, is on such a grid.
    """
    (expert_block if is_expert(name) else kernel_block)(name, grid, columns)


def expert_block(name: str, grid: WeightGrid, columns: int) -> int:
    """Return the largest block that QMoE can have for an expert's matrix; 0 is a scale a row.

    Blocks fill rows exactly. 4 bits, and 8 bits with a scale a row, are multiplied in fp32; for 8 bits in blocks there
    is no such kernel (1.32.0, CPU): activations are rounded to int8 at every accuracy level.

    Raises:
        UsageError: the grid is one of floats, has 8 bits in blocks, or blocks that don't fill rows.
    """
    grid = integers_of(name, grid)
    size = grid.block_size(columns)
    if container_bits(grid) == 8:
        if size == columns:
            return 0
        raise UsageError(
            f"ONNX Runtime's QMoE rounds activations where experts have 8 bits in blocks ({name} is {grid}); choose a "
            "scale a row (int8-channel), 4 bits, or --backend torch."
        )
    found = next((block for block in BLOCKS if size % block == 0 and columns % block == 0), None)
    if found is None:
        raise UsageError(
            f"ONNX Runtime's QMoE has no block that fills an expert's row of {columns} weights in groups of {size} "
            f"({name} is {grid}): it takes multiples of 16; choose another group size, or --backend torch."
        )
    return found


def _spread(weight: QWeight, values: torch.Tensor, rows: slice, block: int, blocks: int) -> NDArray[Any]:
    """Return scales or zero points, one for each of the kernel's blocks, [rows, blocks]."""
    count, columns = weight.codes.shape
    per_row = values.expand(count, -1)[rows].cpu().numpy()
    repeat = -(-weight.grid.block_size(columns) // block)
    return np.ascontiguousarray(np.repeat(per_row, repeat, axis=1)[:, :blocks])
