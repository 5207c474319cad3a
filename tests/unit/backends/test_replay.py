"""The session without a model keeps the contract of a session, exactly."""

import pytest
import torch

from qeval.backends.replay import ReplayBackend, ReplaySession
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError
from qeval.types import Request
from tests.fixtures.tiny import tiny_llama

TOKENS = tuple((7 * i * i + 3) % 50 for i in range(40))


@pytest.fixture
def session():
    return ReplaySession(50, max_length=64)


def state(session, tokens):
    return session.states([Request(tuple(tokens), (len(tokens) - 1,))])[0]


def test_every_token_of_the_context_and_its_place_matter(session):
    base = state(session, TOKENS)
    for index in range(len(TOKENS)):
        changed = [*TOKENS]
        changed[index] = (changed[index] + 1) % 50
        assert not torch.equal(state(session, changed), base)
    assert not torch.equal(state(session, (*TOKENS[:38], TOKENS[39], TOKENS[38])), base)


def test_later_tokens_do_not_matter(session):
    early = session.states([Request(TOKENS, (0, 9))])[0]
    assert torch.equal(early, session.states([Request(TOKENS[:10], (0, 9))])[0])


def test_neither_batches_nor_a_prefix_change_a_bit(session):
    rests = [TOKENS[20:], TOKENS[20:21], TOKENS[25:33]]
    prefix = session.prefill(TOKENS[:20])
    shared = session.states([Request(rest, (len(rest) - 1,)) for rest in rests], prefix)
    assert prefix.length == 20
    for found, rest in zip(shared, rests, strict=True):
        assert torch.equal(found, state(session, TOKENS[:20] + rest))
    assert session.tokens_run == 20 + sum(map(len, rests)) + sum(20 + len(rest) for rest in rests)


def test_logits_are_fp32_and_differ_by_nats(session):
    logits = session.logits(state(session, TOKENS))
    assert logits.shape == (1, session.vocab_size)
    assert logits.dtype == torch.float32
    assert logits.log_softmax(-1).std() > 1.0


def test_what_does_not_fit_is_an_error(session):
    with pytest.raises(QevalError, match="A sequence of 65 tokens is longer than the context of 64"):
        session.states([Request((1,) * 25, (0,))], session.prefill(TOKENS))
    with pytest.raises(QevalError, match="outside the vocabulary of 50"):
        session.prefill([50])
    with pytest.raises(TypeError, match="belongs to the session that made it"):
        session.states([Request((1,), (0,))], TorchSession(tiny_llama()).prefill([1, 2]))


def test_a_backend_opens_sessions_that_answer_alike():
    backend = ReplayBackend(50)
    with backend.open(None) as one, backend.open(None) as two:
        assert torch.equal(one.logits(state(one, TOKENS)), two.logits(state(two, TOKENS)))
    other = ReplaySession(50, seed=1)
    assert not torch.equal(one.logits(state(one, TOKENS)), other.logits(state(other, TOKENS)))
