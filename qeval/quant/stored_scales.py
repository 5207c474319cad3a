"""The scales of a matrix as they lie on disk: each tile's once, powers of two and small floats as bytes.

What is read back is to the bit what was written: the product of a small float and the matrix's scale determines the
small float.
"""

from torch import Tensor

from qeval.quant.elements import E4M3, POWER_RULES
from qeval.quant.floats import decode_element, decode_powers, encode_element, encode_powers, round_to_element
from qeval.quant.grid import FloatGrid, PerTensor, PerTile, WeightGrid
from qeval.quant.qweight import QWeight


def encode_scales(weight: QWeight) -> Tensor:
    """Return the scales of all rows of a matrix as they are stored: fp32, or uint8; a row for each of its own."""
    grid, scales = weight.grid, weight.scales
    if isinstance(grid.granularity, PerTile):
        scales = scales[:: grid.granularity.size]
    if not isinstance(grid, FloatGrid) or grid.scaling == "fp32":
        return scales
    if grid.scaling in POWER_RULES:
        return encode_powers(scales)
    assert weight.global_scale is not None
    return encode_element(round_to_element(scales / weight.global_scale, E4M3), E4M3)


def decode_scales(stored: Tensor, grid: WeightGrid, global_scale: Tensor | None) -> Tensor:
    """Return stored scales in fp32, of the same shape; a tile's is not repeated yet."""
    if not isinstance(grid, FloatGrid) or grid.scaling == "fp32":
        return stored
    if grid.scaling in POWER_RULES:
        return decode_powers(stored)
    assert global_scale is not None
    return decode_element(stored, E4M3) * global_scale


def rows_of_scales(grid: WeightGrid, start: int, stop: int) -> tuple[int, int]:
    """Return which rows of the stored scales those of a matrix from `start` to `stop` have."""
    if isinstance(grid.granularity, PerTensor):
        return 0, 1
    if isinstance(grid.granularity, PerTile):
        return start // grid.granularity.size, -(-stop // grid.granularity.size)
    return start, stop


def repeat_scales(stored: Tensor, grid: WeightGrid, start: int, stop: int) -> Tensor:
    """Return the scales of a matrix's rows from `start` to `stop`, from what `rows_of_scales` names: a row for each."""
    if not isinstance(grid.granularity, PerTile):
        return stored
    first = start % grid.granularity.size
    return stored.repeat_interleave(grid.granularity.size, dim=0)[first : first + stop - start]
