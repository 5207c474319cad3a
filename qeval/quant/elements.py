"""The numbers of few bits that weights, activations and caches are rounded to: small floats and codebooks, as data.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0 (E2M1, E2M3, E3M2, and
E8M0 for scales); bitsandbytes' `get_4bit_type` (NF4 and FP4, whose codebooks are in `functional.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["fp32", "floor", "even", "rceil", "e4m3", "e4m3-46"]
"""The scale of a block: a number in fp32; a power of two by one of three rules; an E4M3 number times one of
the whole matrix, for which a block's largest magnitude goes to 6, or to 6 or 4."""

POWER_RULES: tuple[Scaling, ...] = ("floor", "even", "rceil")
"""The rules for the shared exponent of the OCP Microscaling formats."""


@dataclass(frozen=True)
class Minifloat:
    """A binary floating-point type with a sign, subnormal numbers and few bits.

    Attributes:
        name: Its name in lower case.
        exponent_bits: Bits of the exponent, whose bias is 2^(bits-1) - 1.
        mantissa_bits: Bits of the mantissa.
        largest: The largest finite value.
        has_infinity: Whether the largest exponent means infinity and NaN, as in IEEE 754. Otherwise the codes above
            `largest` are NaN, where there are any.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    has_infinity: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code: sign, exponent, mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest finite number."""
        return math.frexp(self.largest)[1] - 1


@dataclass(frozen=True)
class Codebook:
    """A table of values: a code is an index into it.

    Attributes:
        name: Its name in lower case.
        values: By code; 2^bits of them, the largest magnitude 1.
        is_mirrored: Whether the second half is the first with the other sign, so that a code's highest bit is a sign.
    """

    name: str
    values: tuple[float, ...]
    is_mirrored: bool = False
    largest: float = 1.0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.values).bit_length() - 1


Element = Minifloat | Codebook

E4M3 = Minifloat("e4m3", 4, 3, 448.0)
E5M2 = Minifloat("e5m2", 5, 2, 57344.0, has_infinity=True)
E2M3 = Minifloat("e2m3", 2, 3, 7.5)
E3M2 = Minifloat("e3m2", 3, 2, 28.0)
E2M1 = Minifloat("e2m1", 2, 1, 6.0)
NF4 = Codebook(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Codebook("fp4", tuple(sign * value / 12 for sign in (1, -1) for value in _FP4_TWELFTHS), is_mirrored=True)

ELEMENTS: Mapping[str, Element] = {each.name: each for each in (E4M3, E5M2, E2M3, E3M2, E2M1, NF4, FP4)}
"""All element types by name."""


def element_values(element: Element) -> tuple[float, ...]:
    """Return the value of every code, in the order of the codes.

    >>> element_values(E2M1)[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    if isinstance(element, Codebook):
        return element.values
    magnitudes = [_magnitude(code, element) for code in range(1 << (element.bits - 1))]
    return (*magnitudes, *(-value for value in magnitudes))


def _magnitude(code: int, element: Minifloat) -> float:
    """Return the value of a code without its sign bit."""
    exponent, mantissa = divmod(code, 1 << element.mantissa_bits)
    fraction = mantissa / (1 << element.mantissa_bits)
    if exponent == 0:
        return math.ldexp(fraction, element.smallest_exponent)
    value = math.ldexp(1 + fraction, element.smallest_exponent + exponent - 1)
    if value <= element.largest:
        return value
    return math.inf if element.has_infinity and not mantissa else math.nan
