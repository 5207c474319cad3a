"""A lower bound of KL from a few of a model's log-probabilities: all that a serving endpoint gives of a distribution.

Both distributions are coarsened to the tokens that the endpoint reports and one cell for all others. By the
data-processing inequality no coarsening raises a KL-divergence, so the KL of the two coarse distributions is at most
that of the whole ones; it is equal where every token is reported (Cover and Thomas, Elements of Information Theory,
section 2.8).
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Probability added to the endpoint's cell of all other tokens, which is 1 minus a sum of numbers in fp32.

More probability there can only lower the bound, so that it stays one where the sum was rounded up."""


class LowerBound(NamedTuple):
    """The bound at n positions, fp64: `kl_nats`, and the baseline's probability of all tokens that aren't reported."""

    kl_nats: Tensor
    mass_outside: Tensor


def kl_lower_bound(base_log_probs: Tensor, log_probs: Tensor, *, is_whole: Tensor) -> LowerBound:
    """Return lower bounds of KL(baseline || endpoint) in nats, none below 0, which no KL is.

    Args:
        base_log_probs: The baseline's log-probabilities of the reported tokens, [n, reported]; -inf fills a row up.
        log_probs: The endpoint's of the same tokens, [n, reported]; what stands where a row was filled up is not read.
        is_whole: Whether a row reports the whole vocabulary, so that nothing lies outside, [n] bool.
    """
    base, other = base_log_probs.double(), log_probs.double()
    p = base.exp()
    there = p > 0
    inside = torch.where(there, p * (base - other), 0.0).sum(-1)

    # the cell of all other tokens; one that the baseline gives no probability adds nothing
    filled = torch.isneginf(base)
    p_outside = (1 - p.sum(-1)).clamp(min=0).masked_fill(is_whole, 0.0)
    q_outside = (1 - other.exp().masked_fill(filled, 0.0).sum(-1)).clamp(min=0) + ROUNDING
    outside = torch.xlogy(p_outside, p_outside) - p_outside * q_outside.log()
    return LowerBound((inside + outside).clamp(min=0), p_outside)
