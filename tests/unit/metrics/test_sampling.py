"""KL and escapes under a sampler against plain definitions, a real sampler, and transformers' own top-p."""

import math

import pytest
import torch
from transformers import TopPLogitsWarper

from qeval.compare.arguments import sampling
from qeval.errors import UsageError
from qeval.metrics.sampling import compare_sampling, nucleus
from qeval.types import Sampler


def pair(vocabulary=400, rows=6):
    random = torch.Generator().manual_seed(vocabulary)
    base = torch.randn(rows, vocabulary, generator=random) * 3
    return base, base + torch.randn(rows, vocabulary, generator=random) * 0.5


def by_hand(base, other, sampler):
    """Both numbers of one position, from a sort and Python's own floats."""

    def tempered(row):
        weights = [math.exp(x / sampler.temperature) for x in row]
        return [w / math.fsum(weights) for w in weights]

    def likeliest(p):
        chosen, held = set(), 0.0
        for token in sorted(range(len(p)), key=lambda i: -p[i]):
            if held >= sampler.top_p:
                break
            chosen.add(token)
            held += p[token]
        return chosen

    p, q = tempered(base.tolist()), tempered(other.tolist())
    ours, theirs = likeliest(p), likeliest(q)
    p_mass, q_mass = math.fsum(p[i] for i in ours), math.fsum(q[i] for i in ours)
    kl = math.fsum(p[i] / p_mass * math.log((p[i] / p_mass) / (q[i] / q_mass)) for i in ours)
    return [kl, math.fsum(q[i] for i in theirs - ours) / math.fsum(q[i] for i in theirs)]


@pytest.mark.parametrize("sampler", [Sampler(0.9, 0.7), Sampler(0.5, 1.5), Sampler(0.97, 3.0), Sampler(1.0, 0.8)])
def test_both_numbers_are_what_the_definition_says(sampler):
    base, other = pair(3000 if sampler.temperature == 3 else 400)
    wanted = [by_hand(*row, sampler) for row in zip(base, other, strict=True)]
    found = compare_sampling(base, other, sampler)
    torch.testing.assert_close(found.T, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert float(found[0].min()) > 0
    assert compare_sampling(base, base, sampler).abs().max() < 1e-6


def test_the_nucleus_is_transformers_own():
    logits, _ = pair()
    kept = TopPLogitsWarper(0.8)(torch.zeros(6, 1), logits.clone()).isfinite()
    assert torch.equal(nucleus(logits.softmax(-1), 0.8), kept)


def test_as_many_samples_lie_outside_as_a_sampler_draws():
    base, other = pair(rows=3)
    sampler, draws = Sampler(0.7, 1.2), 100_000
    outside = compare_sampling(base, other, sampler)[1]
    wrap = TopPLogitsWarper(sampler.top_p)
    q = wrap(torch.zeros(3, 1), other / sampler.temperature).softmax(-1)
    drawn = torch.multinomial(q, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    never = ~wrap(torch.zeros(3, 1), base / sampler.temperature).isfinite()
    share = never.gather(-1, drawn).double().mean(-1)
    assert float(outside.max()) > 0.01
    assert ((share - outside).abs() <= 4 * (outside * (1 - outside) / draws).sqrt()).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_p=0", "top_p is a share above 0, and at most 1"),
        ("top_p=1.5", "top_p is a share above 0, and at most 1"),
        ("temperature=0", "a temperature is finite and above 0"),
        ("temperature=inf", "a temperature is finite and above 0"),
        ("top_k=5", "top_k"),
        ("top_p", "--sampling takes numbers such as top_p=0.9,temperature=0.7, not 'top_p'"),
        ("", "--sampling names nothing"),
    ],
)
def test_what_no_sampler_does_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        sampling(text)


def test_a_mapping_says_the_same():
    assert sampling({"top_p": 0.9, "temperature": 0.7}) == sampling("top_p=0.9, temperature=0.7") == Sampler(0.9, 0.7)
