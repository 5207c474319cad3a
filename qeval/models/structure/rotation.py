"""A comparison of two configurations' rotary positions, however they spell them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_SAME = 1e-4
"""Frequencies that went through float32, or through factors in a file, differ by less."""


def same_rotation(one: Any, other: Any) -> bool:
    """Return whether two configurations give the same rotary frequencies and the same factor of attention.

    Args:
        one: A text configuration of transformers.
        other: Another, of the same sizes.
    """
    try:
        first, second = _rotations(one), _rotations(other)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return first.keys() == second.keys() and all(_are_alike(first[kind], second[kind]) for kind in first)


def _rotations(config: Any) -> dict[str, list[tuple[Tensor, float]]]:
    """Return the frequencies and factor of each kind of layer, of short and of long sequences."""
    rope: Mapping[str, Any] = config.rope_parameters
    kinds: dict[str, Mapping[str, Any]] = {name: part for name, part in rope.items() if isinstance(part, dict)}
    return {name: _frequencies(config, part, name) for name, part in (kinds or {"": rope}).items()}


def _frequencies(config: Any, rope: Mapping[str, Any], kind: str) -> list[tuple[Tensor, float]]:
    if (rope_type := rope.get("rope_type", "default")) == "default":
        return [(_default_frequencies(config, rope), 1.0)]
    lengths = (1, int(config.max_position_embeddings) + 1) if rope_type == "longrope" else (1,)
    of_kind = {"layer_type": kind} if kind else {}
    computed = (ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=n, **of_kind) for n in lengths)
    rotations = [(frequencies, float(factor)) for frequencies, factor in computed]
    return rotations[:1] if all(_are_close(rotations[0], each) for each in rotations) else rotations


def _default_frequencies(config: Any, rope: Mapping[str, Any]) -> Tensor:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    turned = int(head * partial)
    frequencies: Tensor = 1.0 / (rope["rope_theta"] ** (torch.arange(0, turned, 2).float() / turned))
    return frequencies


def _are_alike(first: list[tuple[Tensor, float]], second: list[tuple[Tensor, float]]) -> bool:
    return len(first) == len(second) and all(_are_close(one, other) for one, other in zip(first, second, strict=True))


def _are_close(one: tuple[Tensor, float], other: tuple[Tensor, float]) -> bool:
    if one[0].shape != other[0].shape or abs(one[1] - other[1]) > _SAME:
        return False
    return torch.allclose(one[0].float(), other[0].float(), rtol=_SAME, atol=0)
