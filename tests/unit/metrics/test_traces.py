"""Numbers along forced text, against a loop over positions in fp64."""

import pytest
import torch

from qeval.metrics.traces import Probes, trace_numbers, unpacked

ROWS, WIDTH, VOCABULARY = 7, 5, 21


@pytest.fixture(scope="module")
def sides():
    generator = torch.Generator().manual_seed(3)
    heads = [torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2)]
    states = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2)]
    return heads, states, torch.randint(0, 256, (ROWS, 3), generator=generator, dtype=torch.uint8)


def logits_of(head):
    return lambda states: states @ head.T


def test_every_number_is_that_of_a_loop(sides):
    (base_head, head), (base_states, states), masks = sides
    targets = torch.tensor([0, 20, 3, -1, 5, 6, 7])
    sets = torch.zeros((2, 9), dtype=torch.bool)  # narrower than the vocabulary
    sets[0, [1, 8]], sets[1, 4] = True, True
    base = (logits_of(base_head), base_states)
    found = trace_numbers(logits_of(head), states, Probes(targets, sets, masks), 3, base)

    for row in range(ROWS):
        log_p = torch.log_softmax((base_states[row] @ base_head.T).double(), -1)
        log_q = torch.log_softmax((states[row] @ head.T).double(), -1)
        q = log_q.exp()
        allowed = [bool(int(masks[row, token // 8]) >> token % 8 & 1) for token in range(VOCABULARY)]
        assert found.pred[row] == int(q.argmax())
        assert found.kl_nats[row] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), abs=1e-6)
        assert found.masses[:, row].tolist() == pytest.approx([float(q[1] + q[8]), float(q[4])], abs=1e-6)
        leak = sum(float(q[token]) for token in range(VOCABULARY) if not allowed[token])
        assert found.leak[row] == pytest.approx(leak, abs=1e-6)
        expected = float(log_q[targets[row]]) if targets[row] >= 0 else float("nan")
        assert found.log_p[row] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_the_baseline_has_no_distance_and_a_chain_no_leak(sides):
    (head, _), (states, _), masks = sides
    probes = Probes(torch.zeros(ROWS, dtype=torch.int64), torch.zeros((0, 1), dtype=torch.bool))
    found = trace_numbers(logits_of(head), states, probes, 2)
    assert found.kl_nats is None
    assert found.leak is None
    assert unpacked(masks).shape == (ROWS, 24)


def test_tokens_that_the_tokenizer_lacks_leak(sides):
    """A mask narrower than the logits allows none of what it doesn't reach."""
    (head, _), (states, _), _ = sides
    masks = torch.full((ROWS, 1), 255, dtype=torch.uint8)
    probes = Probes(torch.zeros(ROWS, dtype=torch.int64), torch.zeros((0, 1), dtype=torch.bool), masks)
    found = trace_numbers(logits_of(head), states, probes, 4)
    outside = torch.softmax((states @ head.T).double(), -1)[:, 8:].sum(-1)
    assert torch.allclose(found.leak, outside, atol=1e-6)
