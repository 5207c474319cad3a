"""The token metrics against their definitions, computed by numpy with 64 bits of mantissa."""

import numpy as np
import pytest
import torch

from qeval.metrics.tokens import distance, mean_kl, near_kl

ROWS, VOCABULARY = 37, 300


def logits(seed, scale=4.0):
    return scale * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def identity(states):
    return states


def log_softmax(values):
    wide = values.numpy().astype(np.longdouble)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def exact_kl(base, other):
    log_p, log_q = log_softmax(base), log_softmax(other)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1).astype(float)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3, 1e-4])
def test_near_kl_is_kl_down_to_what_rounding_hides(apart):
    base = logits(0)
    other = base + apart * logits(1, scale=1.0)
    expected = exact_kl(base, other)
    found = near_kl(identity, base, identity, other).numpy()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-17)
    assert expected.min() > 0


def test_near_kl_doesnt_see_a_shift_of_all_logits_and_is_0_of_itself():
    base = logits(2)
    assert float(near_kl(identity, base, identity, base).abs().max()) == 0
    assert float(near_kl(identity, base, identity, base + 2.0).abs().max()) < 1e-13


def test_every_distance_is_its_definition():
    base, other = logits(3), logits(4)
    targets = torch.arange(ROWS) * 7 % VOCABULARY
    targets[5] = -1
    log_p, log_q = log_softmax(base), log_softmax(other)
    found = distance(identity, base, identity, other, targets, block=10)
    p, q = np.exp(log_p), np.exp(log_q)
    picked = np.where(targets.numpy() < 0, np.nan, log_q[np.arange(ROWS), targets.clamp(min=0).numpy()])
    for values, expected in (
        (found.kl_nats, (p * (log_p - log_q)).sum(-1)),
        (found.reverse_kl_nats, (q * (log_q - log_p)).sum(-1)),
        (found.kl_abs_modelopt, (p * abs(log_p - log_q)).sum(-1)),
        (found.numbers.entropy_nats, -(q * log_q).sum(-1)),
        (found.numbers.log_p, picked),
    ):
        assert values.numpy() == pytest.approx(expected.astype(float), rel=1e-5, nan_ok=True)
    assert found.top1_agreement.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert mean_kl(identity, base, identity, other, 10) == pytest.approx(float(found.kl_nats.mean()), rel=1e-6)
