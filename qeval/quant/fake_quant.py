"""Activations, keys and values rounded and returned as floats: what a runtime computes with, in fp32.

Integers are symmetric, rounded half to even, with qmax = 2^(bits-1) - 1 from the largest magnitude: `q =
clamp(round(x * (qmax / amax)))` and `q * (amax / qmax)`, as weights are; with `ort`, qmax = 2^(bits-1), bit for bit as
ONNX Runtime's GroupQueryAttention does it. Small floats follow `quant/floats.py`. ggml's block types follow
`ggml-quants.c` (`quantize_row_q8_0_ref`, `quantize_row_iq4_nl_ref` ...): scales are stored in fp16.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor

from qeval.quant.floats import (
    block_scales,
    fake_quantize_blocks,
    global_scale_of,
    largest_magnitude,
    over_blocks,
    round_to_element,
)
from qeval.quant.rotation import sylvester
from qeval.quant.rtn import inverse_and_scale
from qeval.quant.scheme import TensorFormat

_LLAMA_ROTATION = 64


def fake_quantize_rows(values: Tensor, how: TensorFormat, amax: Tensor | None = None) -> Tensor:
    """Quantize and dequantize along the last dimension.

    Args:
        values: [..., columns], any float type: inputs [batch, tokens, columns], or keys [batch, heads, tokens, size].
        how: The format; its rotation is `rotate`'s.
        amax: The largest magnitudes that a static format's scales come from, to be broadcast over `values`: one number,
            or [heads, 1, size] for a scale a channel.

    Returns:
        fp32, of the same shape. Rows don't depend on each other.

    Raises:
        ValueError: The format is static and no largest magnitude is there.
    """
    if how.is_static and amax is None:
        raise ValueError(f"{how} takes its scales from calibration text, and there are none.")
    wide = values.float()
    if how.span != "block":
        return _on_one_scale(wide, largest_magnitude(wide).unsqueeze(-1) if amax is None else amax, how)
    if how.element is not None:
        whole = None if amax is None else global_scale_of(amax, how.element, how.rule)
        return fake_quantize_blocks(wide, how.element, how.size, how.rule, whole)

    if how.kind in _GGML:
        return over_blocks(wide, how.size, _GGML[how.kind])
    return over_blocks(
        wide, how.size, lambda blocks: _on_one_scale(blocks, largest_magnitude(blocks).unsqueeze(-1), how)
    )


def rotate(heads: Tensor, size: int) -> Tensor:
    """Multiply each `size` consecutive numbers of the last dimension by a Hadamard matrix over sqrt(size): QuaRot's R3.

    The matrix is symmetric and orthogonal, so a second call undoes the first. Queries that are rotated as keys are give
    the same products; an output of rotated values is rotated back. So rounding inside a rotation is all there is to do.
    """
    parts = heads.float().reshape(*heads.shape[:-1], -1, size)
    return torch.matmul(parts, _hadamard(size, heads.device)).flatten(-2)


def rotation_size(head_size: int, *, of_keys: bool) -> int:
    """Return the size of the Hadamard matrix that rotates a head: llama.cpp's where it has one.

    llama.cpp (`llama-kv-cache.cpp`) rotates heads that 64 divides: keys by the largest power of two that does, values
    64 at a time. Other heads are rotated here by the largest power of two that divides them.
    """
    largest = head_size & -head_size
    return largest if of_keys else min(largest, _LLAMA_ROTATION)


def fake_quantize_heads(heads: Tensor, how: TensorFormat, amax: Tensor | None = None, *, of_keys: bool) -> Tensor:
    """Quantize and dequantize keys or values as a cache holds them: after the rotary embedding.

    Args:
        heads: [batch, heads, tokens, head size].
        how: The format.
        amax: As `fake_quantize_rows` takes it; of rotated heads, where the format rotates.
        of_keys: Whether they are keys.

    Returns:
        fp32, of the same shape.
    """
    if not how.hadamard:
        return fake_quantize_rows(heads, how, amax)
    size = rotation_size(heads.shape[-1], of_keys=of_keys)
    return rotate(fake_quantize_rows(rotate(heads, size), how, amax), size)


def _on_one_scale(values: Tensor, amax: Tensor, how: TensorFormat) -> Tensor:
    """Round values [..., n] on scales from `amax`, which is broadcast over them."""
    if how.element is not None:
        scales = block_scales(values, amax, how.element, "fp32")
        return round_to_element(values / scales, how.element).mul_(scales)
    largest = (1 << (how.bits - 1)) - 1
    inverse, scales = inverse_and_scale(amax, how.steps)
    return (values * inverse).round_().clamp_(-largest - 1, largest).mul_(scales)


def _q8_0(blocks: Tensor) -> Tensor:
    """Round blocks [..., 32] to ggml's Q8_0: half away from zero, scale amax / 127."""
    amax = largest_magnitude(blocks).unsqueeze(-1)
    scale = amax / torch.full_like(amax, 127.0)
    scaled = blocks * _inverse(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    codes = (whole + (2 * (magnitude - whole)).floor()).copysign(scaled)
    return codes * scale.half().float()


def _from_extreme(blocks: Tensor, half: int) -> Tensor:
    """Round blocks [..., 32] to ggml's Q4_0 or Q5_0: the number of largest magnitude goes to code -half, sign kept."""
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    scale = extreme / torch.full_like(extreme, -float(half))
    codes = (blocks * _inverse(scale) + (half + 0.5)).trunc_().clamp_(0, 2 * half - 1).sub_(float(half))
    return codes * scale.half().float()


def _from_range(blocks: Tensor, largest: int) -> Tensor:
    """Round blocks [..., 32] to ggml's Q4_1 or Q5_1: codes 0 to `largest` from the least number to the greatest."""
    least, greatest = (each.unsqueeze(-1) for each in torch.aminmax(blocks, dim=-1))
    width = greatest - least
    scale = width / torch.full_like(width, float(largest))
    codes = ((blocks - least) * _inverse(scale) + 0.5).trunc_().clamp_(0, largest)
    return codes * scale.half().float() + least.half().float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    """Round blocks [..., 32] to ggml's IQ4_NL: a table's values on the scale of least error, weighted by x^2.

    As `quantize_row_iq4_nl_ref`: values are chosen on the scale by which the number of largest magnitude goes to -127,
    a tie to the greater one; then the scale is the weighted least squares', its sums in fp32 in the order of numbers.
    """
    table = torch.tensor(_IQ4_NL_VALUES, device=blocks.device)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    inverse = _inverse(extreme / torch.full_like(extreme, _IQ4_NL_VALUES[0]))
    middles = (table[1:] + table[:-1]) / 2
    chosen = table[torch.bucketize(blocks * inverse, middles, right=True)]
    weighted = blocks * blocks * chosen
    products, squares = (torch.zeros_like(extreme[..., 0]) for _ in range(2))
    for place in range(blocks.shape[-1]):
        products = products + weighted[..., place] * blocks[..., place]
        squares = squares + weighted[..., place] * chosen[..., place]
    scale = torch.where(extreme[..., 0].abs() < _IQ4_NL_ZERO, 0.0, products / squares)
    return chosen * scale.half().float().unsqueeze(-1)


_IQ4_NL_VALUES = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
"""`kvalues_iq4nl` of ggml-common.h."""
_IQ4_NL_ZERO = 1e-15
"""ggml's GROUP_MAX_EPS: a block of smaller numbers is zeros."""
_GGML: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q5_0": partial(_from_extreme, half=16),
    "q5_1": partial(_from_range, largest=31),
    "q4_0": partial(_from_extreme, half=8),
    "q4_1": partial(_from_range, largest=15),
    "iq4_nl": _iq4_nl,
}
"""Roundings of ggml's block types, by name."""


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0.0, torch.ones_like(scale) / scale)


@lru_cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """Return Sylvester's Hadamard matrix of a power of two, over sqrt(size)."""
    return (sylvester(size).float() / math.sqrt(size)).to(device)
