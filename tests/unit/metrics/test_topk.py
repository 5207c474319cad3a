"""Top-k agreement against a sort with the same rule for equals, and the bytes that it reads."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qeval.metrics.tokens import distance
from qeval.metrics.topk import TOP_K, top_tokens, topk_agreement
from tests.fixtures.pretend_gpu import pretend_gpu


def pair(vocabulary, rows=8, step=None):
    random = torch.Generator().manual_seed(vocabulary)
    base = torch.randn(rows, vocabulary, generator=random) * 3
    other = base + torch.randn(rows, vocabulary, generator=random)
    return (base, other) if step is None else ((base / step).round() * step, (other / step).round() * step)


def by_sorting(logits, k):
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in logits.tolist()]


@pytest.mark.parametrize(("vocabulary", "step"), [(3, None), (64, 1.0), (640, None), (1000, 1.0), (3001, 0.5)])
def test_the_first_of_equals_are_in_whatever_the_vocabulary(vocabulary, step):
    base, other = pair(vocabulary, step=step)
    assert top_tokens(base, 10).tolist() == by_sorting(base, 10)
    shares = topk_agreement(base, other)
    for row, k in zip(shares, TOP_K, strict=True):
        both = zip(by_sorting(base, k), by_sorting(other, k), strict=True)
        wanted = [len({*a} & {*b}) / min(k, vocabulary) for a, b in both]
        assert row.tolist() == pytest.approx(wanted, abs=1e-12)
    assert bool((topk_agreement(base, base) == 1).all())
    assert vocabulary < 10 or float(shares.mean()) < 1


def test_negative_zero_is_zero():
    assert top_tokens(torch.tensor([[-1.0, -0.0, 0.0, -0.0]]), 2).tolist() == [[1, 2]]


class _Reads(TorchDispatchMode):
    """Counts the operators that take or make something as wide as the logits; views read nothing."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.names = numbers, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = any(isinstance(each, torch.Tensor) and each.numel() == self.numbers for each in (*args, out))
        if wide and not func.is_view:
            self.names[func.name().partition(".")[0]] += 1
        return out


def test_each_logit_is_read_once_beside_the_kernels_two_times():
    """The sweep's kernel reads 16 bytes a logit of the pair (test_sweep.py), and a maximum of each 8; a gather few."""
    base, other = pair(128_000, rows=2)
    with _Reads(base.numel()) as reads:
        topk_agreement(base, other)
    assert reads.names == {"aten::amax": 2, "aten::gather": 2}


def test_the_same_on_a_gpu():
    weight = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(16)
    cpu = distance(lambda x: x @ weight.T, states, lambda x: x @ weight.T.round(decimals=1), states, targets, 4)
    with pretend_gpu():
        one, two = (each.to("cuda:0") for each in (weight.T, weight.T.round(decimals=1)))
        on_gpu = states.to("cuda:0")
        gpu = distance(lambda x: x @ one, on_gpu, lambda x: x @ two, on_gpu, targets, 4)
    for k in TOP_K:
        assert torch.equal(gpu.topk_agreement[k], cpu.topk_agreement[k])
        assert 0 < float(cpu.topk_agreement[k].mean()) < 1
