"""What every session owes, whatever is behind it: the same answers alone or in a batch, after a prefix or without."""

import pytest
import torch

from qeval.backends.base import Session, SessionDefaults
from qeval.backends.decoding import Greedy
from qeval.backends.replay import ReplaySession
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError
from qeval.types import Call, Request
from tests.fixtures.engines_llamacpp import STAND_IN, llama_session
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import tiny_llama

TOLERANCE = 1e-4
CONTEXT = 256
VOCABULARY = 256

SESSIONS = {
    "replay": lambda: ReplaySession(VOCABULARY, max_length=CONTEXT),
    "torch-llama": lambda: TorchSession(tiny_llama(vocab_size=VOCABULARY)),
    **{
        f"torch-{family.lower()}": lambda family=family: TorchSession(tiny_family(family, vocab_size=VOCABULARY))
        # sliding windows, soft caps, parallel attention, learned positions, experts
        for family in ("Mistral", "Gemma2", "Phi", "GPT2", "Mixtral")
    },
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
}
ORIGINAL = 16


def long_rope():
    """Phi-3.5's way: sequences beyond 16 tokens have other rotary frequencies, from their first token on."""
    model = tiny_family(
        "Phi3", vocab_size=VOCABULARY, rope_parameters=LONG_ROPE, original_max_position_embeddings=ORIGINAL
    )
    return TorchSession(model)


def on_onnx(name):
    from tests.fixtures.onnx import float_folder, ort_session

    return ort_session(float_folder(name))


SESSIONS["torch-longrope"] = long_rope
ONNX = ("llama", "gemma3", "phi3", "olmo2")
"""Grouped queries in one operator, alone and with a window; with LongRoPE; standard operators, which take batches."""
SESSIONS |= {f"ort-{name}": lambda name=name: on_onnx(name) for name in ONNX}
SESSIONS |= {f"llama.cpp-{module}": lambda module=module: llama_session(module) for module in ("llama_cpp", STAND_IN)}
"""Makers of sessions; two calls of one give sessions that answer alike."""


@pytest.fixture(scope="module", params=SESSIONS)
def make(request):
    if request.param.startswith("ort-"):
        pytest.importorskip("onnxruntime_genai")
        pytest.importorskip("onnxscript")
    if request.param == "llama.cpp-llama_cpp":
        pytest.importorskip("llama_cpp")
    return SESSIONS[request.param]


@pytest.fixture(scope="module")
def session(make):
    return make()


def tokens(count, seed=0):
    return tuple(torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def last(ids):
    return Request(ids, (len(ids) - 1,))


def logits(session, request, prefix=None):
    return session.logits(session.states([request], prefix)[0])


def assert_close(one, other):
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= TOLERANCE


def test_shapes_types_and_widths(session):
    requests = [Request(tokens(12), (0, 5, 11)), Request(tokens(7, seed=1), (6,))]
    found = session.states(requests)
    assert [len(states) for states in found] == [3, 1]
    assert len({states.shape[1] for states in found}) == 1
    for states in found:
        rows = session.logits(states)
        assert rows.shape == (len(states), session.vocab_size) == (len(states), VOCABULARY)
        assert states.dtype == rows.dtype == torch.float32
        assert bool(torch.isfinite(rows).all())
    assert session.max_length == CONTEXT


def test_the_same_question_has_the_same_answer_bit_for_bit(make, session):
    request = Request(tokens(30), tuple(range(30)))
    first = logits(session, request)
    assert torch.equal(first, logits(session, request))
    assert torch.equal(first, logits(make(), request))


def test_batches_of_any_size_and_order_give_the_same_states(session):
    requests = [Request(tokens(n, seed=n), tuple(sorted({0, n // 2, n - 1}))) for n in (3, 17, 9, 30, 1)]
    alone = [session.states([request])[0] for request in requests]
    together = session.states(requests)
    backwards = session.states(requests[::-1])[::-1]
    for one, batched, turned in zip(alone, together, backwards, strict=True):
        assert_close(batched, one)
        assert_close(turned, one)


def test_answers_do_not_depend_on_what_was_asked_before(session):
    short, long = Request(tokens(9), (8,)), Request(tokens(60), (59,))
    first = logits(session, short)
    logits(session, long)
    assert torch.equal(logits(session, short), first)


def test_asking_for_fewer_positions_changes_none(session):
    ids = tokens(25)
    every = session.states([Request(ids, tuple(range(25)))])[0]
    assert_close(session.states([Request(ids, (3, 24))])[0], every[[3, 24]])


def test_a_position_sees_what_is_before_it_and_nothing_after(session):
    ids = tokens(14)
    early = session.states([Request(ids, (9,))])[0]
    assert_close(session.states([last(ids[:10])])[0], early)
    other = (ids[9] + 1) % VOCABULARY
    assert float((session.states([last((*ids[:9], other))])[0] - early).abs().max()) > TOLERANCE
    context = (*ids[:6], (ids[6] + 1) % VOCABULARY, *ids[7:10])
    assert float((session.states([last(context)])[0] - early).abs().max()) > TOLERANCE


@pytest.mark.parametrize("length", [1, 7, 23])
def test_a_shared_prefix_changes_nothing(session, length):
    """23 tokens are longer than the sliding windows, 7 are shorter; continuations cross the windows' edge."""
    prefix, rests = tokens(length), [tokens(n, seed=n) for n in (5, 1, 12)]
    kept = session.prefill(prefix)
    assert kept.length == length
    requests = [Request(rest, tuple(range(len(rest)))) for rest in rests]
    first, again = session.states(requests, kept), session.states(requests, kept)
    for rest, shared, repeated in zip(rests, first, again, strict=True):
        positions = tuple(range(length, length + len(rest)))
        whole = session.states([Request(prefix + rest, positions)])[0]
        assert torch.equal(shared, repeated)
        assert_close(shared, whole)
        assert_close(session.logits(shared), session.logits(whole))


@pytest.mark.parametrize("outer", [1, 7, 23])
def test_a_prefix_inside_a_prefix_changes_nothing(session, outer):
    """On either side of the sliding windows' edge; the outer prefix goes on serving others."""
    first, second, rests = tokens(outer), tokens(10, seed=1), [tokens(n, seed=n) for n in (5, 1, 12)]
    kept = session.prefill(first)
    inner = session.prefill(second, kept)
    assert inner.length == outer + 10
    whole_prefix = session.prefill(first + second)
    requests = [Request(rest, tuple(range(len(rest)))) for rest in rests]
    for shared, other in zip(session.states(requests, inner), session.states(requests, whole_prefix), strict=True):
        assert_close(shared, other)
    for shared, rest in zip(session.states(requests, kept), rests, strict=True):
        positions = tuple(range(outer, outer + len(rest)))
        assert_close(shared, session.states([Request(first + rest, positions)])[0])


def test_two_prefixes_do_not_disturb_each_other(session):
    one, two, rest = tokens(11, seed=1), tokens(14, seed=2), tokens(6, seed=3)
    kept = [session.prefill(prefix) for prefix in (one, two)]
    for prefix, mine in zip((one, two, one), (*kept, kept[0]), strict=True):
        assert_close(logits(session, last(rest), mine), logits(session, last(prefix + rest)))


def test_the_whole_context_can_be_used_and_no_more(session):
    full = tokens(CONTEXT)
    kept = session.prefill(full[:200])
    assert_close(logits(session, last(full[200:]), kept), logits(session, last(full)))
    for refused in (
        lambda: session.states([last((*full, 1))]),
        lambda: session.states([last(tokens(3)), last((*full, 1))]),
        lambda: session.states([last(full[199:])], kept),
        lambda: session.prefill((*full, 1)),
    ):
        with pytest.raises(QevalError, match="A sequence of 257 tokens is longer than the context of 256"):
            refused()


def test_the_answers_say_something(session):
    """Distributions that were all alike would pass most of the above."""
    ids = tokens(40)
    rows = logits(session, Request(ids, tuple(range(40)))).log_softmax(-1)
    assert float(rows.std(dim=0).max()) > 0.1
    assert len(set(rows.argmax(-1).tolist())) > 3


def test_calls_that_are_announced_change_no_answer(session):
    """Nor does one that was not announced, or one that never comes."""
    assert isinstance(session, Session)
    first, second, other = (Request(tokens(9, seed=seed), (3, 8)) for seed in (4, 5, 6))
    alone = [session.states([request])[0] for request in (first, second, other)]
    session.expect([Call((), (first,)), Call((), (second,)), Call((), (Request(tokens(5), (4,)),))])
    for request, states in zip((first, second, other), alone, strict=True):
        assert_close(session.states([request])[0], states)
    session.expect([])


def test_a_session_that_gains_nothing_looks_at_no_call():
    """What is found and scheduled for the calls' sake is not done for it."""

    def calls():
        yield pytest.fail("it was looked at")

    SessionDefaults().expect(calls())


def test_it_generates_the_likeliest_tokens_or_says_that_it_does_not(session):
    prompts = [tokens(7, seed=seed) for seed in (7, 8)]
    if not isinstance(session, TorchSession):
        with pytest.raises(QevalError, match="can't generate"):
            session.greedy(prompts, 3)
        with pytest.raises(QevalError, match="scores and can't generate answers"):
            session.generate(prompts, 3, Greedy(), ())
        return
    for prompt, said in zip(prompts, session.greedy(prompts, 3).tolist(), strict=True):
        for place, token in enumerate(said):
            assert int(logits(session, last((*prompt, *said[:place]))).argmax()) == token
