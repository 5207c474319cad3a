"""The types of llama.cpp's keys and values that a scheme names, as `type_k` and `type_v` of a context.

llama.cpp has its own block types, rotates either both or none of them (where 64 divides a head), and multiplies by
quantized values in flash attention alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from qeval.errors import UsageError
from qeval.quant.scheme import GGML_KINDS, Scheme, TensorFormat

_DEFAULT = "f16"
_ROTATION_SWITCH = "LLAMA_ATTN_ROT_DISABLE"
"""The environment variable by which llama.cpp leaves rotations out; it is read when a context is made."""
_ROTATED_HEADS = 64
"""llama.cpp rotates heads that so many numbers divide."""
_BYTES_A_NUMBER = {
    "f16": 2.0, "f32": 4.0, "q8_0": 34 / 32, "q5_0": 22 / 32, "q5_1": 24 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32,
    "iq4_nl": 18 / 32,
}  # fmt: skip


@dataclass(frozen=True)
class CacheTypes:
    """The types of keys and values by their names in ggml, and whether heads are rotated before they are rounded."""

    keys: str = _DEFAULT
    values: str = _DEFAULT
    rotates: bool = False

    @property
    def needs_flash(self) -> bool:
        """Return whether llama.cpp computes attention over them by flash attention alone."""
        return self.values in GGML_KINDS

    @property
    def numbers(self) -> tuple[int, int]:
        """The numbers that ggml has for both types."""
        return int(GGMLQuantizationType[self.keys.upper()]), int(GGMLQuantizationType[self.values.upper()])

    @property
    def bytes_of_both(self) -> float:
        """The bytes of a number of the keys and one of the values."""
        return _BYTES_A_NUMBER[self.keys] + _BYTES_A_NUMBER[self.values]

    def __str__(self) -> str:
        """Return the types in words: `keys q8_0, values q4_0, rotated`."""
        return f"keys {self.keys}, values {self.values}" + (", rotated" if self.rotates else "")


F16_CACHE = CacheTypes()
"""The types of llama.cpp where nothing else is said."""


def cache_types(scheme: Scheme) -> CacheTypes:
    """Return the types of a scheme's keys and values.

    Raises:
        UsageError: llama.cpp has no such inputs, keys or values.
    """
    if scheme.activations is not None:
        raise UsageError("it rounds activations in a way of its own in products by quantized weights, and in no other.")
    if scheme.rotates_inputs:
        raise UsageError("it turns no inputs while running; leave r4 out, R1 and R2 are in the weights.")
    used = [how for how in (scheme.keys, scheme.values) if how is not None]
    if other := next((how for how in used if how.kind not in GGML_KINDS), None):
        raise UsageError(f"it has no type {other} for keys or values; its types are {', '.join(GGML_KINDS)}.")
    if len({how.hadamard for how in used}) > 1:
        raise UsageError("it rotates keys and values both, or neither; name both with -hadamard, or none.")
    return CacheTypes(_type_of(scheme.keys), _type_of(scheme.values), any(how.hadamard for how in used))


def check_rotated_heads(types: CacheTypes, head_size: int) -> None:
    """Refuse a rotation of heads that llama.cpp does not rotate.

    Raises:
        UsageError: It says which heads it does.
    """
    if types.rotates and head_size % _ROTATED_HEADS:
        raise UsageError(
            f"llama.cpp rotates heads that {_ROTATED_HEADS} divides, and this model's have {head_size}; leave "
            "-hadamard out."
        )


@contextmanager
def rotations_as(types: CacheTypes) -> Iterator[None]:
    """Have a context that is made inside the block rotate heads, or not, whatever the environment says."""
    before = os.environ.get(_ROTATION_SWITCH)
    os.environ[_ROTATION_SWITCH] = "0" if types.rotates else "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ROTATION_SWITCH]
        else:
            os.environ[_ROTATION_SWITCH] = before


def _type_of(how: TensorFormat | None) -> str:
    return _DEFAULT if how is None else how.kind
