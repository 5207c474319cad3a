"""How one matrix is quantized: bits, granularity, symmetric or not; and the names that users type for it."""

import re
from dataclasses import dataclass

from qeval.errors import UsageError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class PerBlock:
    """A scale for every `size` consecutive weights of a row; the last block of a row may be shorter."""

    size: int


@dataclass(frozen=True)
class PerChannel:
    """A scale for every row (output channel)."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole matrix."""


Granularity = PerBlock | PerChannel | PerTensor


@dataclass(frozen=True)
class Grid:
    """The values that the weights of one matrix may take.

    Symmetric: `scale * q` with q in -2^(bits-1) .. 2^(bits-1)-1 and the scale from the largest magnitude.
    Asymmetric: `scale * (q - zero point)` with q in 0 .. 2^bits-1 and an integer zero point, over a range that
    always includes zero.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse what no kernel of the field stores."""
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"A grid has {MIN_BITS} to {MAX_BITS} bits, not {self.bits}.")
        if isinstance(self.granularity, PerBlock) and self.granularity.size < 1:
            raise UsageError(f"A block holds at least one weight, not {self.granularity.size}.")

    @property
    def zero(self) -> int:
        """The code that stands for 0.0 in a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def block_size(self, columns: int) -> int:
        """How many weights of a row of `columns` share a scale."""
        return min(self.granularity.size, columns) if isinstance(self.granularity, PerBlock) else columns

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a [rows, columns] matrix."""
        if isinstance(self.granularity, PerTensor):
            return 1, 1
        return rows, -(-columns // self.block_size(columns))

    def size_bits(self, rows: int, columns: int) -> int:
        """Bits on disk of a [rows, columns] matrix: packed codes, fp32 scales, packed zero points."""
        blocks, wide = self.scale_shape(rows, columns)
        return rows * columns * self.bits + blocks * wide * (32 if self.symmetric else 32 + self.bits)

    def __str__(self) -> str:
        """The name that `parse` takes: `int4-g128`, `int8-channel`, `int4-g32-asym`."""
        where = {PerChannel: "channel", PerTensor: "tensor"}.get(type(self.granularity), "")
        if isinstance(self.granularity, PerBlock):
            where = f"g{self.granularity.size}"
        return f"int{self.bits}-{where}" + ("" if self.symmetric else "-asym")


DEFAULT_GRID = Grid(4, PerBlock(128))
_WORDS = "int2 .. int8, gN (block of N) or channel or tensor, sym or asym, joined by '-'"


def parse(text: str, default: Grid = DEFAULT_GRID) -> Grid:
    """The grid that a name such as `int8-channel` or `g32-asym` means; what it leaves out comes from `default`.

    >>> str(parse("int8-channel")), str(parse("g32-asym"))
    ('int8-channel', 'int4-g32-asym')

    Raises:
        UsageError: a word that no grid has.
    """
    bits, granularity, symmetric = default.bits, default.granularity, default.symmetric
    for word in filter(None, text.split("-")):
        if match := re.fullmatch(r"int(\d+)", word):
            bits = int(match[1])
        elif match := re.fullmatch(r"g(\d+)", word):
            granularity = PerBlock(int(match[1]))
        elif word in ("channel", "tensor"):
            granularity = PerChannel() if word == "channel" else PerTensor()
        elif word in ("sym", "asym"):
            symmetric = word == "sym"
        else:
            raise UsageError(f"'{word}' in '{text}' is not part of a grid's name; it takes {_WORDS}.")
    return Grid(bits, granularity, symmetric)


def describe(grid: Grid) -> str:
    """The granularity in words: `block 128`, `per channel`, `per tensor`."""
    if isinstance(grid.granularity, PerBlock):
        return f"block {grid.granularity.size}"
    return "per channel" if isinstance(grid.granularity, PerChannel) else "per tensor"
