"""The formats of keys and values that ONNX Runtime's GroupQueryAttention has on the CPU, as its attributes say them."""

from dataclasses import dataclass
from typing import Literal

from qeval.errors import UsageError
from qeval.quant.scheme import Scheme

ORT_CACHES = ("int8-tensor-ort", "int8-channel-ort", "int4-tensor-ort", "int4-channel-ort")
"""The names of the formats."""
_CPU = "cpu"


@dataclass(frozen=True)
class CacheFormat:
    """The attributes of the operator: `kv_cache_bit_width`, and `k_quant_type`, which is `v_quant_type` too."""

    bits: int
    quant_type: Literal["PER_TENSOR", "PER_CHANNEL"]


def cache_format(scheme: Scheme, ep: str = _CPU) -> CacheFormat | None:
    """Return the format of a scheme's keys and values; None where both stay in float.

    Args:
        scheme: What a variant rounds beside its weights.
        ep: The execution provider.

    Raises:
        UsageError: The operator has no such keys and values.
    """
    if not scheme.caches:
        return None
    keys, values = scheme.keys, scheme.values
    if keys is None or values is None or keys != values or str(keys) not in ORT_CACHES:
        named = ", ".join(f"{part} {how}" for part, how in scheme.formats.items())
        raise UsageError(
            f"its attention has keys and values of one format, {', '.join(ORT_CACHES)}, and not {named}; say for "
            f"example +kv-{ORT_CACHES[0]}."
        )
    if ep != _CPU:
        raise UsageError(f"such keys and values were tried on the CPU's kernel alone, not on {ep}; say --ep {_CPU}.")
    return CacheFormat(keys.bits, "PER_TENSOR" if keys.span == "tensor" else "PER_CHANNEL")
