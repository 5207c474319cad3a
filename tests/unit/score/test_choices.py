"""Scoring against its slow definition on a session without a model: sums, sharing, order, rows."""

import math
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qeval.backends.replay import ReplaySession
from qeval.errors import QevalError
from qeval.score.choices import (
    count_pair_tokens,
    item_columns,
    prompt_sha256,
    question_tokens,
    score_pairs,
    score_questions,
)
from qeval.store.schema import ITEMS_SCHEMA
from qeval.tasks.harness import Question, load_suite
from qeval.types import Request
from tests.fixtures.tiny import tiny_tokenizer

VOCAB = 40
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6).map(tuple)
heads = st.sampled_from([(), (3,) * 90, (3,) * 90 + (4,) * 70])
some_pairs = st.lists(st.tuples(st.builds(lambda a, b: a + b, heads, ids), ids), min_size=1, max_size=10)


def nobody(done):
    del done


def slowly(session, context, rest):
    """The definition: one forward over the whole text, the whole vocabulary's log-softmax, a sum in fp64."""
    states = session.states([Request((*context, *rest), tuple(range(len(context) + len(rest))))])[0]
    log_p = session.logits(states).log_softmax(-1).double()
    rows = range(len(context) - 1, len(context) + len(rest) - 1)
    total = math.fsum(float(log_p[row, token]) for row, token in zip(rows, rest, strict=True))
    return total, all(int(log_p[row].argmax()) == token for row, token in zip(rows, rest, strict=True))


@given(pairs=some_pairs, batch_tokens=st.integers(1, 400))
@settings(deadline=None, max_examples=40)
def test_scores_are_their_definition_whatever_is_shared_or_batched(pairs, batch_tokens):
    session = ReplaySession(VOCAB)
    found = score_pairs(session, pairs, batch_tokens, nobody)
    for (score, greedy), (context, rest) in zip(found, pairs, strict=True):
        expected, is_greedy = slowly(session, context, rest)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy


def test_greedy_is_told_of_every_token():
    session = ReplaySession(VOCAB)
    text = (1, 2, 3)
    for _ in range(3):
        state = session.states([Request(text, (len(text) - 1,))])[0]
        text = (*text, int(session.logits(state).argmax()))
    right, wrong = text[3:], (*text[3:5], (text[5] + 1) % VOCAB)
    assert [greedy for _, greedy in score_pairs(session, [(text[:3], right), (text[:3], wrong)], 64, nobody)] == [
        True,
        False,
    ]


def test_letters_share_one_forward_and_questions_share_their_header():
    session = ReplaySession(VOCAB)
    header = tuple(i % VOCAB for i in range(600))
    pairs = [((*header, q, q + 1, q), (letter,)) for q in range(20) for letter in range(4)]
    told = []
    score_pairs(session, pairs, 256, told.append)
    assert session.tokens_run <= 602 + 20 * 3
    assert sum(told) == count_pair_tokens(pairs) == 20 * 603


class Broken(ReplaySession):
    """Answers NaN once more than five tokens were run."""

    def logits(self, states):
        return super().logits(states) * (math.nan if self.tokens_run > 5 else 1.0)


def test_logits_that_are_not_finite_are_an_error():
    assert score_pairs(Broken(VOCAB), [((1, 2, 3), (4,))], 64, nobody)
    with pytest.raises(QevalError, match="not finite"):
        score_pairs(Broken(VOCAB), [((1, 2, 3, 4, 5, 6), (7,))], 64, nobody)


@pytest.fixture(scope="module")
def sample():
    return load_suite(
        "mmlu", tiny_tokenizer(), max_length=10**5, bos="auto", shots=1, limit=2, folder=None, subjects=()
    )


def test_rows_hold_what_was_scored(sample):
    session = ReplaySession(256, max_length=10**5)
    questions = sample.parts()[0]
    told = []
    scores = score_questions(session, questions, 4096, told.append)
    assert sum(told) == question_tokens(questions)
    table = pa.Table.from_pydict(item_columns(sample, questions, scores, "rtn", "replay"), schema=ITEMS_SCHEMA)
    for row, question, found in zip(table.to_pylist(), questions, scores, strict=True):
        values = [score for score, _ in found]
        assert row["choice_loglikelihoods"] == values
        assert row["pred"] == values.index(max(values))
        assert row["acc"] == float(row["pred"] == row["gold"])
        assert row["acc_norm"] is None
        assert (row["variant"], row["backend"], row["task"]) == ("rtn", "replay", "mmlu")
        assert (row["subject"], row["item"], row["gold"]) == (question.subject, question.item, question.gold)
        assert (row["shots"], row["prompt_tokens"]) == (1, len(question.prompt))
        assert row["prompt_sha256"] == prompt_sha256(question)


def test_equal_choices_go_to_the_first(sample):
    question = sample.questions[0]
    rows = item_columns(sample, [question], [[(-1.0, False)] * 4], "rtn", "replay")
    assert rows["pred"] == [0]


def test_a_prompts_hash_tells_ids_and_their_borders_apart():
    question = Question("s", 0, 0, (((1, 2), (3,)), ((1, 2), (4,))), 2, 0)
    others = [(((1, 2), (3,)), ((1, 2), (5,))), (((1,), (2, 3)), ((1, 2), (4,))), (((1, 2, 3), ()), ((1, 2), (4,)))]
    hashes = {prompt_sha256(replace(question, pairs=pairs)) for pairs in [question.pairs, *others]}
    assert len(hashes) == 4
    assert prompt_sha256(replace(question, item=5, gold=1)) in hashes


def test_scores_are_sums_in_fp64():
    session = ReplaySession(VOCAB)
    rest = tuple(torch.randint(0, VOCAB, (300,), generator=torch.Generator().manual_seed(0)).tolist())
    ((score, _),) = score_pairs(session, [((1,), rest)], 4096, nobody)
    assert score == pytest.approx(slowly(session, (1,), rest)[0], abs=1e-10)


class Watched(ReplaySession):
    """Remembers the lengths of every batch."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.batches = []

    def states(self, requests, prefix=None):
        self.batches.append([len(request.tokens) for request in requests])
        return super().states(requests, prefix)


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40, unique=True), batch_tokens=st.integers(1, 4096))
@settings(deadline=None, max_examples=40)
def test_batches_keep_their_budget_and_pad_little(lengths, batch_tokens):
    session = Watched(VOCAB)
    session.packs = False
    score_pairs(session, _of_lengths(lengths), batch_tokens, nobody)
    for batch in session.batches:
        padded = max(batch) * len(batch)
        assert len(batch) == 1 or padded <= batch_tokens
        assert sum(batch) >= 0.95 * padded


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40, unique=True), batch_tokens=st.integers(1, 4096))
@settings(deadline=None, max_examples=40)
def test_packed_batches_keep_their_budget_whatever_the_lengths(lengths, batch_tokens):
    session = Watched(VOCAB)
    score_pairs(session, _of_lengths(lengths), batch_tokens, nobody)
    for batch, after in zip(session.batches, [*session.batches[1:], [10**9]], strict=True):
        assert len(batch) == 1 or sum(batch) <= batch_tokens
        assert len(batch) == 1 or max(batch) * len(batch) <= 2 * batch_tokens
        more = [*batch, after[0]]
        assert sum(more) > batch_tokens or max(more) * len(more) > 2 * batch_tokens


def _of_lengths(lengths):
    return [((i % VOCAB, i // VOCAB, *(5,) * n), (1,)) for i, n in enumerate(lengths)]
