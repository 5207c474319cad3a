"""Rotary positions of a GGUF file as transformers' `rope_parameters`: scaled linearly, by YaRN, or by factors.

llama.cpp divides each frequency by a factor: Llama 3's lie in the tensor rope_freqs, LongRoPE's in rope_factors_short
and rope_factors_long.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qeval.models.gguf.settings import Metadata

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (FREQS, SHORT, LONG)
"""The tensors that hold factors."""
_SAME = 1e-4
_BASE, _LOCAL_BASE = 10_000.0, 10_000.0
"""llama.cpp's base where a file names none, and Gemma 3's in its layers with a window."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_parameters(
    metadata: "Metadata", values: Mapping[str, Any], factors: Mapping[str, np.ndarray], *, partial: bool
) -> dict[str, Any]:
    """Return the rotary parameters that a file means.

    Args:
        metadata: The file's keys.
        values: The settings that were read so far.
        factors: Its tensors of factors, by name.
        partial: Whether the architecture may rotate a part of each head.

    Raises:
        UsageError: The file scales in a way that is not read, or rotates another part of a head than the model does.
    """
    keys, head = metadata.keys, values["head_dim"]
    rotated = int(keys.get("rope.dimension_count", head))
    rope: dict[str, Any] = {"rope_theta": float(keys.get("rope.freq_base", _BASE))}
    if rotated != head:
        if not partial:
            raise metadata.error(f"rotates {rotated} of the {head} numbers of a head, which its model does not")
        rope["partial_rotary_factor"] = rotated / head
    rope |= _scaling(metadata, values, factors, rotated, rope["rope_theta"])
    if metadata.architecture != "gemma3":
        return rope
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", _LOCAL_BASE))},
    }


def _scaling(
    metadata: "Metadata", values: Mapping[str, Any], factors: Mapping[str, np.ndarray], rotated: int, theta: float
) -> dict[str, Any]:
    keys = metadata.keys
    kind, factor = str(keys.get("rope.scaling.type", "none")), float(keys.get("rope.scaling.factor", 0) or 0)
    if linear := float(keys.get("rope.scale_linear", 0) or 0):
        kind, factor = "linear", linear

    if FREQS in factors and (kind in ("none", "linear") and factor in (0, 1)):
        return _rule_of_factors(values, factors[FREQS], rotated, theta)
    if kind == "longrope" or SHORT in factors:
        return _longrope(metadata, values, factors)
    if FREQS in factors:
        raise metadata.error(f"has rotary factors (rope_freqs) beside scaling by {kind}, which is not read")

    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(metadata, values, factor)
    raise metadata.error(f"scales rotary positions by '{kind}', which is not read")


def _yarn(metadata: "Metadata", values: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return YaRN as llama.cpp computes it: the attention factor grows with the logarithm of the scale."""
    keys = metadata.keys
    original = int(keys.get("rope.scaling.original_context_length", values["max_position_embeddings"]))
    if float(keys.get("rope.scaling.yarn_ext_factor", 1.0)) not in (1.0, -1.0) or factor < 1:
        raise metadata.error("scales rotary positions by YaRN with a factor that is not read")
    scale = float(keys.get("rope.scaling.attn_factor", 1.0)) * float(keys.get("rope.scaling.yarn_attn_factor", 1.0))
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, name, usual in (("fast", "beta_fast", 32.0), ("slow", "beta_slow", 1.0)):
        rope[name] = float(keys.get(f"rope.scaling.yarn_beta_{key}", usual))
    return rope if scale == 1 else {**rope, "attention_factor": scale * (0.1 * math.log(factor) + 1)}


def _longrope(metadata: "Metadata", values: Mapping[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return LongRoPE: one set of factors up to the original context, another beyond it."""
    if not {SHORT, LONG} <= factors.keys():
        raise metadata.error(f"scales rotary positions by LongRoPE and lacks {SHORT} or {LONG}")
    longest = values["max_position_embeddings"]
    original = int(metadata.keys.get("rope.scaling.original_context_length", longest))
    usual = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
    return {
        "rope_type": "longrope",
        "factor": longest / original,
        "original_max_position_embeddings": original,
        "short_factor": [float(value) for value in factors[SHORT]],
        "long_factor": [float(value) for value in factors[LONG]],
        "attention_factor": float(metadata.keys.get("rope.scaling.attn_factor", usual)),
    }


def _rule_of_factors(values: Mapping[str, Any], factors: np.ndarray, rotated: int, theta: float) -> dict[str, Any]:
    """Return the rule that factors of the frequencies follow: Llama 3's where one fits, else the factors."""
    waves = wavelengths(theta, rotated)
    if len(factors) != len(waves):
        return _longrope_of_one_set(values, factors)
    if np.allclose(factors, 1, atol=_SAME):
        return {"rope_type": "default"}
    for original in _possible_contexts(factors, waves):
        rule = {"rope_type": "llama3", "factor": float(f"{factors.max():.6g}"), **_LLAMA3}
        rule["original_max_position_embeddings"] = original
        if np.allclose(llama3_factors(rule, waves), factors, rtol=_SAME, atol=_SAME):
            return rule
    return _longrope_of_one_set(values, factors)


def wavelengths(theta: float, size: int) -> np.ndarray:
    """Return the wavelength of each frequency in tokens, [size / 2], of rotary positions over `size` numbers."""
    return np.asarray(2 * math.pi * theta ** (np.arange(0, size, 2) / size))


def llama3_factors(rule: Mapping[str, Any], waves: np.ndarray) -> np.ndarray:
    """Return what Llama 3's rule divides frequencies by, [waves]: 1 for short ones, `factor` for long ones.

    Args:
        rule: `rope_parameters` of the type `llama3`.
        waves: The wavelength of each frequency, in tokens.
    """
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    share = np.clip((rule["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - share) / factor + share))


def _possible_contexts(factors: np.ndarray, waves: np.ndarray) -> Iterator[int]:
    """Yield original contexts that a factor between the extremes allows, and the usual powers of two."""
    low, high, factor = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], float(factors.max())
    between = (factors > 1 + _SAME) & (factors < factor * (1 - _SAME))
    for value, wave in zip(factors[between], waves[between], strict=True):
        share = (1 / value - 1 / factor) / (1 - 1 / factor)
        yield round(wave * (low + share * (high - low)))
    yield from (1 << power for power in range(4, 20))


def _longrope_of_one_set(values: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Return LongRoPE whose short and long factors are one, so that nothing changes with the length."""
    each = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": values["max_position_embeddings"],
        "short_factor": each,
        "long_factor": each,
        "attention_factor": 1.0,
    }
