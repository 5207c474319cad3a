"""A quantized matrix: codes, scales, zero points, grid. Every backend consumes this one form.

The rounding rule of symmetric integers (`full`), in fp32: `inverse = qmax / amax` (a true division, tensor by tensor:
torch evaluates a number divided by a tensor as a reciprocal times the number, an ulp off), `q =
clamp(round_half_even(w * inverse))`. On exact ties this differs by a whole step from dividing by `amax / qmax`.
Dequantized: `(code - zero) * scale`. On a float grid a code stands for a value of the element: rounded `w / scale`,
dequantized `value * scale`.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from qeval.errors import UsageError
from qeval.quant.floats import decode_element
from qeval.quant.grid import FloatGrid, PerBlock, PerTensor, WeightGrid


@dataclass(frozen=True, eq=False)
class QWeight:
    """A [rows, columns] matrix on a grid.

    `codes` [rows, columns] uint8, from 0 to 2^bits - 1; `scales` [rows, blocks] fp32 ([1, 1] per tensor);
    `zeros` uint8 of the scales' shape, or None on a symmetric grid, where the zero point is 2^(bits-1).
    `global_scale` [1, 1] fp32, where the grid has one: it is a factor of `scales` already.
    """

    grid: WeightGrid
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        rows, columns = self.codes.shape
        shape = self.grid.scale_shape(rows, columns)
        if tuple(self.scales.shape) != shape:
            raise ValueError(f"Scales of shape {tuple(self.scales.shape)} where {self.grid} needs {shape}.")
        if (self.zeros is None) != self.grid.symmetric:
            raise ValueError("Zero points belong to asymmetric grids, and only to them.")
        if (self.global_scale is not None) != (isinstance(self.grid, FloatGrid) and self.grid.has_global_scale):
            raise ValueError(
                "A scale of the whole matrix belongs to grids with scales of two levels, and only to them."
            )

    @property
    def size_bits(self) -> int:
        """Bits on disk: packed codes, scales, packed zero points."""
        return self.grid.size_bits(*self.codes.shape)

    def dequantize(self) -> Tensor:
        """Return the matrix of the codes' values, [rows, columns] fp32."""
        codes = to_blocks(self.codes, self.grid)
        if isinstance(self.grid, FloatGrid):
            values = decode_element(codes, self.grid.element).mul_(self.scales.unsqueeze(-1))
            return from_blocks(values, *self.codes.shape)
        zeros = float(self.grid.zero) if self.zeros is None else self.zeros.float().unsqueeze(-1)
        values = codes.float().sub_(zeros).mul_(self.scales.unsqueeze(-1))
        return from_blocks(values, self.codes.shape[0], self.codes.shape[1])


def to_blocks(matrix: Tensor, grid: WeightGrid) -> Tensor:
    """Return `matrix` as [rows, blocks, block size] ([1, 1, all] per tensor), a short last block padded with zeros.

    Zeros change neither a block's largest magnitude nor a range that includes zero, so the short block's scale
    is that of its own weights.
    """
    if isinstance(grid.granularity, PerTensor):
        return matrix.reshape(1, 1, -1)
    rows, columns = matrix.shape
    size = grid.block_size(columns)
    missing = -columns % size
    return (pad(matrix, (0, missing)) if missing else matrix).reshape(rows, -1, size)


def from_blocks(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Return the matrix [rows, columns] that `to_blocks` made `blocks` of, without the padding."""
    return blocks.reshape(rows, -1)[:, :columns]


def check_fits(name: str, columns: int, grid: WeightGrid) -> None:
    """Refuse a block larger than a row.

    Raises:
        UsageError: It names the weight, the block and the row's width.
    """
    if isinstance(grid.granularity, PerBlock) and grid.granularity.size > columns:
        raise UsageError(
            f"Blocks of {grid.granularity.size} are larger than a row of {name} ({columns} weights); "
            f"take a smaller group size or per-channel scales{' (fp8-channel)' if isinstance(grid, FloatGrid) else ''}."
        )
