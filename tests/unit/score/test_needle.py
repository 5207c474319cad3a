"""Forced answers against plain forward passes: log-probability and rank, whatever is shared or batched."""

import pytest
import torch

from qeval.backends.torch import TorchSession
from qeval.score.choices import count_pair_tokens, rank_pairs, score_pairs, shared_pair_tokens
from qeval.score.jobs import ignore
from qeval.tasks.needle import depths_of, write_haystack
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

LENGTH = 700


@pytest.fixture(scope="module")
def model():
    return tiny_llama(max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def pairs():
    return write_haystack(tiny_tokenizer(), "auto", LENGTH, 0, depths_of(3), 0).pairs


@torch.inference_mode()
def by_forward(model, prompt, answer):
    """The answer's log-probability and its tokens' largest rank, from all logits of one sequence and a sort."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    orders = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in log_p.tolist()]
    ranks = [order.index(token) + 1 for order, token in zip(orders, answer, strict=True)]
    return sum(float(row[token]) for row, token in zip(log_p, answer, strict=True)), max(ranks)


@pytest.mark.parametrize("batch_tokens", [64, 10_000])
def test_scores_are_those_of_plain_forward_passes(model, pairs, batch_tokens):
    found = rank_pairs(TorchSession(model), pairs, batch_tokens, ignore)
    for score, pair in zip(found, pairs, strict=True):
        log_p, rank = by_forward(model, *pair)
        assert score.log_p == pytest.approx(log_p, abs=1e-4)
        assert score.rank == rank
    assert max(score.rank for score in found) > 1


def test_a_rank_of_one_is_what_is_said_greedily(model, pairs):
    prompt = pairs[0][0]
    (said,) = TorchSession(model).greedy([prompt], 2).tolist()
    for answer in ((*said,), (said[0], (said[1] + 1) % 256)):
        ((_, greedy),) = score_pairs(TorchSession(model), [(prompt, answer)], 10_000, ignore)
        (ranked,) = rank_pairs(TorchSession(model), [(prompt, answer)], 10_000, ignore)
        assert (ranked.rank == 1) == greedy == (answer == (*said,))


def test_a_haystack_is_read_once_for_all_of_its_needles(pairs):
    assert shared_pair_tokens(pairs) < 1.2 * LENGTH
    assert count_pair_tokens(pairs) > 2.5 * LENGTH
