"""The lower bound of KL from a few log-probabilities, against the KL of whole distributions."""

import pytest
import torch

from qeval.metrics.coarse import kl_lower_bound

VOCABULARY = 97


def distributions(spread):
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, 400, VOCABULARY, generator=generator, dtype=torch.float64)
    base = torch.log_softmax(3 * draw[0], dim=-1)
    return base, torch.log_softmax(3 * draw[0] + spread * draw[1], dim=-1)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("top", [1, 5, 20, VOCABULARY - 1, VOCABULARY])
def test_it_is_at_most_the_kl_and_equal_with_the_whole_vocabulary(spread, top):
    base, other = distributions(spread)
    kl = (base.exp() * (base - other)).sum(-1)
    ids = other.topk(top, dim=-1).indices
    whole = torch.full((len(kl),), top == VOCABULARY)
    found = kl_lower_bound(base.gather(1, ids), other.gather(1, ids), is_whole=whole)
    assert (found.kl_nats <= kl + 1e-12).all()
    outside = 1 - base.exp().gather(1, ids).sum(-1)
    assert torch.allclose(found.mass_outside, outside.clamp(min=0), atol=1e-12)
    if top == VOCABULARY:
        assert torch.allclose(found.kl_nats, kl, rtol=0, atol=1e-12)


def test_it_stays_a_bound_when_log_probabilities_are_rounded_to_fp32():
    base, other = distributions(1.0)
    kl = (base.exp() * (base - other)).sum(-1)
    ids = other.topk(VOCABULARY - 1, dim=-1).indices  # next to nothing is left outside, so rounding shows
    shown = other.gather(1, ids).float() + 1e-7
    found = kl_lower_bound(base.gather(1, ids), shown, is_whole=torch.zeros(len(kl), dtype=torch.bool))
    assert (found.kl_nats <= kl + 1e-6).all()


def test_rows_of_fewer_tokens_are_filled_up():
    base, other = distributions(1.0)
    ids = other.topk(3, dim=-1).indices
    sides = base.gather(1, ids), other.gather(1, ids)
    more = torch.full((len(ids), 2), -torch.inf), torch.zeros(len(ids), 2)
    filled = [torch.cat(each, dim=1) for each in zip(sides, more, strict=True)]
    no = torch.zeros(len(base), dtype=torch.bool)
    assert torch.equal(kl_lower_bound(*filled, is_whole=no).kl_nats, kl_lower_bound(*sides, is_whole=no).kl_nats)
