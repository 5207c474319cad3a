"""Grids of one matrix: its values, its granularity, its scales; and the names that users type for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, get_args

from qeval.errors import UsageError, unknown
from qeval.quant.elements import E2M1, E2M3, E3M2, E4M3, E5M2, FP4, NF4, POWER_RULES, Element, Minifloat, Scaling

MIN_BITS, MAX_BITS = 2, 8
FLOAT = "float"
"""The name of no grid: what a rule or a mix leaves in float."""
SymmetricRange = Literal["full", "half", "signed"]
"""The place of a block's largest magnitude on a symmetric grid of `b` bits: at the code 2^(b-1) - 1 (`full`: 7 of
INT4); half a step above it (`half`: 7.5), so that it rounds to or saturates at the last code; or exactly at the code
-2^(b-1) (`signed`: -8), for which the scale may be negative."""


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


@dataclass(frozen=True)
class PerTile:
    """A scale for every square of `size` rows and columns; those at the right and at the bottom may be smaller."""

    size: int


Granularity = PerBlock | PerChannel | PerTensor


class _Blocked:
    """A grid's granularity as shapes."""

    granularity: Granularity | PerTile

    def block_size(self, columns: int) -> int:
        """Return how many weights of a row of `columns` share a scale."""
        if isinstance(self.granularity, PerBlock | PerTile):
            return min(self.granularity.size, columns)
        return columns

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a [rows, columns] matrix in memory: a tile's is repeated for its rows."""
        if isinstance(self.granularity, PerTensor):
            return 1, 1
        return rows, -(-columns // self.block_size(columns))


@dataclass(frozen=True)
class Grid(_Blocked):
    """The integers that the weights of one matrix may take.

    Symmetric: `scale * q` with q in -2^(bits-1) .. 2^(bits-1)-1 and the scale from the largest magnitude, by `span`.
    Asymmetric: `scale * (q - zero point)` with q in 0 .. 2^bits-1 and an integer zero point, over a range that
    always includes zero.

    `span` is None where no name says it: of asymmetric grids, and of matrices that others have quantized. What is
    quantized on such a grid gets the `default_span`.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    span: SymmetricRange | None = None

    def __post_init__(self) -> None:
        """Refuse what no kernel of the field stores."""
        if not self.symmetric and self.span is not None:
            raise UsageError(f"'{self.span}' says how a symmetric grid spans its range; leave it or 'asym' out.")
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

    @property
    def default_span(self) -> SymmetricRange:
        """The range that a symmetric grid gets where no name says one.

        `signed` has the least error at every width, 12 % less than `full` at 4 bits. At 8 bits that is 1 %, and
        the field's kernels and libraries have 127 there.
        """
        return "full" if self.bits == MAX_BITS else "signed"

    @property
    def spans_rows(self) -> bool:
        """Return whether a scale depends on several rows, so that they can't be quantized one by one."""
        return isinstance(self.granularity, PerTensor)

    def size_bits(self, rows: int, columns: int) -> int:
        """Return the bits on disk of a [rows, columns] matrix: packed codes, fp32 scales, packed zero points."""
        blocks, wide = self.scale_shape(rows, columns)
        return rows * columns * self.bits + blocks * wide * (32 if self.symmetric else 32 + self.bits)

    def __str__(self) -> str:
        """Return the name that `parse` takes: `int4-g128-signed`, `int8-channel`, `int4-g32-asym`."""
        where = {PerChannel: "channel", PerTensor: "tensor"}.get(type(self.granularity), "")
        if isinstance(self.granularity, PerBlock):
            where = f"g{self.granularity.size}"
        last = self.span if self.symmetric else "asym"
        return "-".join(filter(None, (f"int{self.bits}", where, last)))


@dataclass(frozen=True)
class FloatGrid(_Blocked):
    """The small floats, or the values of a codebook, that the weights of one matrix may take, times a scale.

    Attributes:
        name: What `parse` takes.
        element: The values.
        granularity: Which weights share a scale.
        scaling: What a scale is.
        multiplies: Whether weights are multiplied by `largest / amax`, not divided by the scale `amax / largest`. It
            decides where a weight goes that lies halfway between two values, as many of bf16's do.
    """

    name: str
    element: Element
    granularity: Granularity | PerTile
    scaling: Scaling = "fp32"
    multiplies: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.element.bits

    @property
    def symmetric(self) -> bool:
        """True: there are no zero points."""
        return True

    @property
    def spans_rows(self) -> bool:
        """Return whether a scale depends on several rows, so that they can't be quantized one by one."""
        return self.has_global_scale or isinstance(self.granularity, PerTensor | PerTile)

    @property
    def has_global_scale(self) -> bool:
        """Return whether the scales of blocks are small floats under a scale of the whole matrix in fp32."""
        return self.scaling in ("e4m3", "e4m3-46")

    @property
    def scale_bits(self) -> int:
        """Bits of a block's scale on disk."""
        return 32 if self.scaling == "fp32" else 8

    def size_bits(self, rows: int, columns: int) -> int:
        """Return the bits on disk of a [rows, columns] matrix: packed codes and scales, each tile's once."""
        high, wide = self.scale_shape(rows, columns)
        if isinstance(self.granularity, PerTile):
            high = -(-rows // self.granularity.size)
        return rows * columns * self.bits + high * wide * self.scale_bits + 32 * self.has_global_scale

    def __str__(self) -> str:
        """Return the name that `parse` takes."""
        return self.name


WeightGrid = Grid | FloatGrid
"""The grid of one matrix."""


def _fp8(prefix: str, element: Minifloat) -> list[FloatGrid]:
    """Return the grids of an 8-bit type, each in Model Optimizer's arithmetic and, `-div`, in compressed-tensors'."""
    shared: dict[str, Granularity | PerTile] = {"tensor": PerTensor(), "channel": PerChannel(), "tile128": PerTile(128)}
    return [
        FloatGrid(f"{prefix}-{name}{last}", element, granularity, multiplies=not last)
        for last in ("", "-div")
        for name, granularity in shared.items()
    ]


def _microscaled(prefix: str, element: Minifloat) -> list[FloatGrid]:
    """Return the OCP Microscaling format of a type by each rule for the shared exponent."""
    return [FloatGrid(f"{prefix}-{rule}", element, PerBlock(32), rule) for rule in POWER_RULES]


FLOAT_GRIDS: Mapping[str, FloatGrid] = {
    grid.name: grid
    for grid in (
        *_fp8("fp8", E4M3),
        *_fp8("fp8e5m2", E5M2),
        *_microscaled("mxfp8", E4M3),
        *_microscaled("mxfp8-e5m2", E5M2),
        *_microscaled("mxfp6-e2m3", E2M3),
        *_microscaled("mxfp6-e3m2", E3M2),
        *_microscaled("mxfp4", E2M1),
        FloatGrid("nvfp4", E2M1, PerBlock(16), "e4m3"),
        FloatGrid("nvfp4-46", E2M1, PerBlock(16), "e4m3-46"),
        FloatGrid("nf4", NF4, PerBlock(64)),
        FloatGrid("fp4", FP4, PerBlock(64)),
    )
}
"""All float grids by their whole names."""

_SHORT_NAMES = {
    "fp8": "fp8-channel",
    "fp8e5m2": "fp8e5m2-channel",
    "mxfp8-e5m2": "mxfp8-e5m2-floor",
    "mxfp8": "mxfp8-floor",
    "mxfp6-e2m3": "mxfp6-e2m3-floor",
    "mxfp6-e3m2": "mxfp6-e3m2-floor",
    "mxfp6": "mxfp6-e2m3-floor",
    **{f"mxfp6-{rule}": f"mxfp6-e2m3-{rule}" for rule in POWER_RULES},
    "mxfp4": "mxfp4-floor",
}
"""The whole names of short ones: scales by channel, the rule of the OCP's specification, E2M3."""

FLOAT_WORDS = tuple(dict.fromkeys(name.partition("-")[0] for name in FLOAT_GRIDS))
"""The words that the names of float grids begin with."""

_SPANS: tuple[SymmetricRange, ...] = get_args(SymmetricRange)
GRID_WORDS = (*FLOAT_WORDS, *FLOAT_GRIDS, "int4", "int8", "channel", "tensor", "sym", "asym", *_SPANS)
"""The words that one that means nothing is compared with."""

DEFAULT_GRID = Grid(4, PerBlock(128))
_WORDS = (
    "int2 .. int8, gN (block of N) or channel or tensor, sym or asym, full or half or signed, joined by '-'; or a "
    f"name that begins with {', '.join(FLOAT_WORDS)}"
)


def names_float(text: str) -> bool:
    """Return whether a name is that of a float grid, or begins as one."""
    return text.partition("-")[0] in FLOAT_WORDS


def parse(text: str, default: WeightGrid = DEFAULT_GRID) -> WeightGrid:
    """Return the grid that a name such as `int8-channel`, `g32-asym` or `nvfp4` means; its range only if named.

    >>> str(parse("int8-channel")), str(parse("g32-asym")), str(parse("mxfp4"))
    ('int8-channel', 'int4-g32-asym', 'mxfp4-floor')

    Args:
        text: Words joined by '-'.
        default: Has what an integer grid's name leaves out.

    Raises:
        UsageError: A word is part of no grid's name.
    """
    if names_float(text):
        name = _SHORT_NAMES.get(text, text)
        if name not in FLOAT_GRIDS:
            word = text.partition("-")[0]
            raise unknown("grid", text, [each for each in FLOAT_GRIDS if each.partition("-")[0] == word])
        return FLOAT_GRIDS[name]
    words = [word for word in text.split("-") if word]
    if isinstance(default, FloatGrid):
        if not words:
            return default
        if not re.fullmatch(r"int\d+", words[0]):
            raise UsageError(f"'{text}' does not say which integers, and the rest is on {default}; say int4-{text}.")
        default = DEFAULT_GRID
    return _parse_integer(text, words, default)


def _parse_integer(text: str, words: list[str], default: Grid) -> Grid:
    """Return the integer grid of the words of a name."""
    bits, granularity, symmetric = default.bits, default.granularity, default.symmetric
    span: SymmetricRange | None = None
    spans = {each: each for each in _SPANS}
    for word in words:
        if match := re.fullmatch(r"int(\d+)", word):
            bits = int(match[1])
        elif match := re.fullmatch(r"g(\d+)", word):
            granularity = PerBlock(int(match[1]))
        elif word in ("channel", "tensor"):
            granularity = PerChannel() if word == "channel" else PerTensor()
        elif word in ("sym", "asym"):
            symmetric = word == "sym"
        elif word in spans:
            span = spans[word]
        else:
            near = get_close_matches(word, GRID_WORDS, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise UsageError(f"'{word}' in '{text}' is not part of a grid's name{hint}; it takes {_WORDS}.")
    return Grid(bits, granularity, symmetric, span or (default.span if symmetric else None))


def with_span(grid: WeightGrid) -> WeightGrid:
    """Return the grid that a name of a recipe's means: its range said, unless it is `full` by default.

    >>> str(with_span(parse("int4-g128"))), str(with_span(parse("int8-channel")))
    ('int4-g128-signed', 'int8-channel')
    """
    if isinstance(grid, FloatGrid) or not grid.symmetric or grid.span or grid.default_span == "full":
        return grid
    return replace(grid, span=grid.default_span)


def describe(grid: WeightGrid) -> str:
    """Return the granularity in words: `block 128`, `per channel`, `per tensor`, `tiles of 128 x 128`."""
    if isinstance(grid.granularity, PerTile):
        return f"tiles of {grid.granularity.size} x {grid.granularity.size}"
    if isinstance(grid.granularity, PerBlock):
        return f"block {grid.granularity.size}"
    return "per channel" if isinstance(grid.granularity, PerChannel) else "per tensor"
