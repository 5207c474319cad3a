"""Rounding to small floats and codebooks, and the scales of their blocks: one arithmetic for all that is quantized.

Values are rounded to the nearest one, ties to even, and saturate: nothing finite becomes infinite or NaN. A block is
divided by its scale, rounded, and multiplied by it again, all in fp32.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from qeval.quant.elements import E4M3, POWER_RULES, Codebook, Element, Minifloat, Scaling, element_values

_FP32_MANTISSA, _FP32_BIAS = 23, 127
_EXPONENT_BITS = 0xFF << _FP32_MANTISSA
TINY = 1e-30
"""A block whose largest magnitude is below it counts as all zeros: its scale could not be divided by."""
_LEAST_E4M3 = 2.0**-9
_HALVED = 16
"""The size of blocks whose largest magnitude is found by halves."""
_FOUR_OVER_SIX_LARGEST = 256.0
"""The largest block scale where 6 is the target, so that the one for 4, half as large again, is an E4M3 number."""


def round_to_element(values: Tensor, element: Element) -> Tensor:
    """Round to the values of an element type: to nearest, ties to even (in a codebook: to the smaller magnitude).

    >>> from qeval.quant.elements import E2M1
    >>> round_to_element(torch.tensor([0.25, 0.75, -2.6, 5.0, 100.0]), E2M1).tolist()
    [0.0, 1.0, -3.0, 4.0, 6.0]

    Args:
        values: Of any shape, fp32, scaled already.
        element: The type; what is larger than its largest value becomes that.

    Returns:
        Values of the type, in fp32, of the same shape.
    """
    if isinstance(element, Codebook):
        return decode_element(_nearest_code(values, element), element)
    clipped = values.clamp(-element.largest, element.largest)

    # the power of two at or below each magnitude is the number with the exponent's bits alone
    power = (clipped.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    step = power.clamp_(min=2.0**element.smallest_exponent).mul_(2.0**-element.mantissa_bits)
    return clipped.div_(step).round_().mul_(step)


def encode_element(values: Tensor, element: Element) -> Tensor:
    """Return the codes, uint8, of values that `round_to_element` gave; a small float's code is its bits."""
    if isinstance(element, Codebook):
        return _nearest_code(values, element)
    magnitude = values.abs()
    above = (element.smallest_exponent + _FP32_BIAS - 1) << element.mantissa_bits
    normal = (magnitude.view(torch.int32) >> (_FP32_MANTISSA - element.mantissa_bits)) - above
    subnormal = (magnitude * 2.0 ** (element.mantissa_bits - element.smallest_exponent)).to(torch.int32)
    code = torch.where(magnitude < 2.0**element.smallest_exponent, subnormal, normal)
    return (code | values.signbit().to(torch.int32) << (element.bits - 1)).to(torch.uint8)


def decode_element(codes: Tensor, element: Element) -> Tensor:
    """Return the values, fp32, of codes in uint8."""
    return _table(element, codes.device)[codes.int()]


def block_scales(
    blocks: Tensor, amax: Tensor, element: Element, scaling: Scaling, global_scale: Tensor | None = None
) -> Tensor:
    """Return the scale of each block, in fp32; that of a block of zeros is some positive number.

    `e4m3`: an E4M3 number, at least 2^-9, times `global_scale`, so that `amax` goes to the largest value of the type.
    `e4m3-46`: that, or one and a half of it, so that `amax` goes to 4 of 6, where the block's squared error is smaller
    (Cook et al., *Four Over Six*, arXiv 2512.02010).

    Args:
        blocks: [..., size], what is to be rounded.
        amax: [...], the largest magnitude of each block.
        element: What the blocks are rounded to.
        scaling: The rule.
        global_scale: Of the whole matrix, one number, where the rule is `e4m3` or `e4m3-46`: see `global_scale_of`.
    """
    if scaling in POWER_RULES:
        return _power_scales(amax, element, scaling)
    if global_scale is None:
        width = amax.masked_fill(amax < TINY, 1.0)
        return width / torch.full_like(width, element.largest)

    share = amax / (global_scale * element.largest)
    if scaling == "e4m3":
        return _e4m3(share) * global_scale
    six, four = (_e4m3(share.clamp(max=_FOUR_OVER_SIX_LARGEST) * factor) * global_scale for factor in (1.0, 1.5))
    losses = [(fake_quantize(blocks, element, scales) - blocks).square_().sum(-1) for scales in (six, four)]
    return torch.where(losses[1] < losses[0], four, six)


def global_scale_of(amax: Tensor, element: Element, scaling: Scaling) -> Tensor | None:
    """Return the scale of a whole matrix in fp32, of `amax`'s shape; None where the rule has none.

    Args:
        amax: The largest magnitude of the matrix.
        element: What it is rounded to.
        scaling: With `e4m3` the block with the largest magnitude gets the scale 448, with `e4m3-46` 256.
    """
    if scaling not in ("e4m3", "e4m3-46"):
        return None
    most = E4M3.largest if scaling == "e4m3" else _FOUR_OVER_SIX_LARGEST
    return amax.masked_fill(amax < TINY, 1.0) / torch.full_like(amax, most * element.largest)


def fake_quantize(blocks: Tensor, element: Element, scales: Tensor) -> Tensor:
    """Return blocks [..., size] rounded on their scales [...], as fp32."""
    wide = scales.unsqueeze(-1)
    return round_to_element(blocks / wide, element).mul_(wide)


def fake_quantize_blocks(
    values: Tensor, element: Element, size: int, scaling: Scaling, global_scale: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize blocks along the last dimension.

    Args:
        values: [..., columns], any float type. A short last block counts as if zeros filled it.
        element: What the blocks are rounded to.
        size: Values of a block; `columns` for one scale a row.
        scaling: The rule for a block's scale.
        global_scale: One number, where the rule is `e4m3` or `e4m3-46` and the scale is known before (static); by
            default it is that of the largest magnitude of all `values`.

    Returns:
        The values in fp32, of the same shape.
    """

    def rounded(blocks: Tensor) -> Tensor:
        amax = largest_magnitude(blocks)
        whole = global_scale_of(amax.amax(), element, scaling) if global_scale is None else global_scale
        return fake_quantize(blocks, element, block_scales(blocks, amax, element, scaling, whole))

    return over_blocks(values.float(), size, rounded)


def over_blocks(values: Tensor, size: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return values [..., columns] with each `size` of them changed as a block [..., size], a short one as if padded.

    Args:
        values: Of any shape.
        size: Values of a block; zeros fill the last one, which change no largest magnitude.
        change: Takes all blocks, [..., blocks, size], and returns as many.
    """
    columns = values.shape[-1]
    padded = pad(values, (0, -columns % size))
    return change(padded.reshape(*values.shape[:-1], -1, size)).reshape(padded.shape)[..., :columns]


def largest_magnitude(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each block [..., size].

    In two passes, since `abs` would copy all of it; blocks of 16 by halves, in half the time of torch's reductions.
    """
    if blocks.shape[-1] != _HALVED:
        return torch.maximum(-blocks.amin(dim=-1), blocks.amax(dim=-1))
    largest = blocks.abs()
    while largest.shape[-1] > 1:
        largest = torch.maximum(*largest.chunk(2, dim=-1))
    return largest.squeeze(-1)


def encode_powers(scales: Tensor) -> Tensor:
    """Return powers of two as E8M0 bytes: the exponent plus 127."""
    return (torch.frexp(scales).exponent + (_FP32_BIAS - 1)).to(torch.uint8)


def decode_powers(codes: Tensor) -> Tensor:
    """Return E8M0 bytes as powers of two in fp32."""
    return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.to(torch.int32) - _FP32_BIAS)


def _power_scales(amax: Tensor, element: Element, rule: Scaling) -> Tensor:
    """Return the powers of two that OCP Microscaling shares over a block.

    `floor` (OCP's): the exponent of `amax` less that of the type's largest value. `even` (compressed-tensors; torchao's
    EVEN): the same of `amax` rounded to the type's mantissa. `rceil` (Model Optimizer; torchao's RCEIL): the smallest
    power for which nothing saturates.
    """
    assert isinstance(element, Minifloat)
    if rule == "rceil":
        amax = amax / torch.full_like(amax, element.largest)
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, with the fraction in [1/2, 1)
    if rule == "rceil":
        exponent = exponent - (fraction == 0.5).int()
    else:
        exponent = exponent - 1 - element.largest_exponent
        # the mantissa rounds up to 2 from half a step below it on
        exponent = (
            exponent + (fraction >= 1 - 2.0 ** -(element.mantissa_bits + 2)).int() if rule == "even" else exponent
        )
    exponent = exponent.masked_fill(amax == 0, -_FP32_BIAS).clamp_(-_FP32_BIAS, _FP32_BIAS)
    return torch.ldexp(torch.ones_like(amax), exponent)


def _e4m3(share: Tensor) -> Tensor:
    return round_to_element(share.clamp(min=_LEAST_E4M3), E4M3)


def _nearest_code(values: Tensor, codebook: Codebook) -> Tensor:
    """Return the code of the nearest value; a value halfway goes to the smaller one, or the smaller magnitude."""
    order, bounds = _bounds(codebook, values.device)
    if not codebook.is_mirrored:
        return order[torch.bucketize(values, bounds)]
    sign = (values < 0).to(torch.uint8) << (codebook.bits - 1)
    return order[torch.bucketize(values.abs(), bounds)] | sign


@lru_cache
def _table(element: Element, device: torch.device) -> Tensor:
    return torch.tensor(element_values(element), device=device)


@lru_cache
def _bounds(codebook: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the codes in the order of their values (of a mirrored codebook the positive half), and what parts them."""
    half = codebook.values[: len(codebook.values) // (2 if codebook.is_mirrored else 1)]
    order = sorted(range(len(half)), key=half.__getitem__)
    ordered = [half[code] for code in order]
    middles = [(low + high) / 2 for low, high in pairwise(ordered)]
    return torch.tensor(order, dtype=torch.uint8, device=device), torch.tensor(middles, device=device)
