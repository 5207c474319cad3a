"""The sweep as a Triton kernel: a program a position, two passes over its two rows of logits.

The first pass finds both largest logits, where they are, and both sums of exponentials (rescaled whenever a larger
logit comes, as Milakov and Gimelshein do, arXiv 1805.02867); the second adds up the terms of every divergence. Terms
are fp32 and sums fp64, as in `metrics.sweep.plain_sweep`. Nothing is written but eight numbers a position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qeval.metrics.sweep import COLUMNS

TILE = 4096
"""Logits of each model that a program works on at a time."""


@triton.jit
def _sweep_kernel(base, other, targets, out, base_stride, other_stride, vocabulary, positions, tile: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    base_row, other_row = base + row * base_stride, other + row * other_stride
    lane = tl.arange(0, tile)
    minus_infinity = float("-inf")

    # first pass: the largest logit of each model, where it is, and the sum of exponentials relative to it
    base_top = tl.full((1,), minus_infinity, tl.float32)
    other_top = tl.full((1,), minus_infinity, tl.float32)
    base_place, other_place = tl.full((1,), 0, tl.int32), tl.full((1,), 0, tl.int32)
    base_sum, other_sum = tl.full((1,), 0.0, tl.float64), tl.full((1,), 0.0, tl.float64)
    for start in range(0, vocabulary, tile):
        columns = start + lane
        inside = columns < vocabulary
        a = tl.load(base_row + columns, mask=inside, other=minus_infinity)
        b = tl.load(other_row + columns, mask=inside, other=minus_infinity)
        a_top, b_top = tl.max(a, axis=0), tl.max(b, axis=0)
        base_place = tl.where(a_top > base_top, start + tl.argmax(a, axis=0), base_place)
        other_place = tl.where(b_top > other_top, start + tl.argmax(b, axis=0), other_place)
        a_top, b_top = tl.maximum(base_top, a_top), tl.maximum(other_top, b_top)
        base_sum = base_sum * tl.exp(base_top - a_top).to(tl.float64) + tl.sum(tl.exp(a - a_top).to(tl.float64), axis=0)
        other_sum = other_sum * tl.exp(other_top - b_top).to(tl.float64) + tl.sum(
            tl.exp(b - b_top).to(tl.float64), axis=0
        )
        base_top, other_top = a_top, b_top

    # second pass: log-probabilities and the terms of the sums
    base_log_sum, other_log_sum = tl.log(base_sum).to(tl.float32), tl.log(other_sum).to(tl.float32)
    kl, reverse = tl.full((1,), 0.0, tl.float64), tl.full((1,), 0.0, tl.float64)
    absolute, entropy = tl.full((1,), 0.0, tl.float64), tl.full((1,), 0.0, tl.float64)
    overlap = tl.full((1,), 0.0, tl.float64)
    for start in range(0, vocabulary, tile):
        columns = start + lane
        inside = columns < vocabulary
        log_p = tl.load(base_row + columns, mask=inside, other=0.0) - base_top - base_log_sum
        log_q = tl.load(other_row + columns, mask=inside, other=0.0) - other_top - other_log_sum
        p, q, difference = tl.exp(log_p), tl.exp(log_q), log_p - log_q
        weighted = tl.where(inside, p * difference, 0.0)
        kl += tl.sum(weighted.to(tl.float64), axis=0)
        absolute += tl.sum(tl.abs(weighted).to(tl.float64), axis=0)
        reverse -= tl.sum(tl.where(inside, q * difference, 0.0).to(tl.float64), axis=0)
        entropy -= tl.sum(tl.where(inside, q * log_q, 0.0).to(tl.float64), axis=0)
        overlap += tl.sum(tl.where(inside, tl.minimum(p, q), 0.0).to(tl.float64), axis=0)

    # the target's log-probabilities: NaN where there is none
    one = tl.arange(0, 1)
    target = tl.load(targets + row + one)
    has_target = target >= 0
    a = tl.load(base_row + target, mask=has_target, other=float("nan"))
    b = tl.load(other_row + target, mask=has_target, other=float("nan"))

    place = out + row + one
    tl.store(place, kl)
    tl.store(place + positions, reverse)
    tl.store(place + 2 * positions, absolute)
    tl.store(place + 3 * positions, (base_place == other_place).to(tl.float64))
    tl.store(place + 4 * positions, (a - base_top - base_log_sum).to(tl.float64))
    tl.store(place + 5 * positions, (b - other_top - other_log_sum).to(tl.float64))
    tl.store(place + 6 * positions, entropy)
    tl.store(place + 7 * positions, tl.minimum(overlap, 1.0))


def kernel_sweep(base: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Return what `metrics.sweep.sweep_logits` does; arguments as there, all on one device."""
    base, other, targets = base.contiguous(), other.contiguous(), targets.contiguous()
    positions, vocabulary = other.shape
    out = torch.empty(COLUMNS, positions, dtype=torch.float64, device=other.device)
    if positions:
        # Triton launches on the current device, whatever its tensors are on.
        with torch.cuda.device_of(other):  # type: ignore[no-untyped-call]
            _sweep_kernel[(positions,)](
                base, other, targets, out, base.stride(0), other.stride(0), vocabulary, positions, tile=TILE,
                num_warps=8,
            )  # fmt: skip
    return out
