"""The cache of answers: what a key holds, how batches are cut, and what memory does not hold."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from qeval.backends.decoding import Greedy, Sampling
from qeval.compare.answers import Answerer
from qeval.compare.chat_choice import ChatChoice
from qeval.progress import Silent

PROMPTS = [(1, 2, 3), (4, 5), (6, 7, 8, 9), (1, 2, 3)]


class Backwards:
    """A backend whose model says a prompt backwards, and holds at most `room` prompts in memory."""

    def __init__(self, room=99):
        self.room, self.asked = room, []

    @contextmanager
    def open(self, target):
        assert target is None
        yield self

    def generate(self, prompts, count, decoding, stops, is_done=None):
        self.asked.append((list(prompts), decoding))
        if len(prompts) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return [tuple(reversed(prompt))[:count] for prompt in prompts]


@pytest.fixture
def answerer(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path))
    return Answerer(Backwards(), "key", ChatChoice(tokens=3), 0, frozenset({9}), 1000)


def said(prompts):
    return [tuple(reversed(prompt))[:3] for prompt in prompts]


def test_each_prompt_is_asked_once_and_longer_ones_first(answerer):
    assert answerer.answers(PROMPTS, Silent()) == said(PROMPTS)
    assert answerer.answers(PROMPTS, Silent()) == said(PROMPTS)
    assert answerer.backend.asked == [([(6, 7, 8, 9), (1, 2, 3), (4, 5)], Greedy())]


def test_what_decides_an_answer_is_in_its_key(answerer):
    answerer.answers(PROMPTS, Silent())
    others = [
        replace(answerer, key="other"),
        replace(answerer, stops=frozenset({8})),
        replace(answerer, choice=ChatChoice(tokens=2)),
        sampled := replace(answerer, choice=ChatChoice(tokens=3, temperature=0.5)),
        replace(sampled, seed=1),
    ]
    for count, other in enumerate(others, 2):
        other.answers(PROMPTS, Silent())
        assert len(answerer.backend.asked) == count
    for same in (replace(answerer, batch_tokens=7), replace(answerer, seed=5)):
        same.answers(PROMPTS, Silent())
        assert len(answerer.backend.asked) == len(others) + 1


def test_a_prompts_seed_is_its_own_whatever_stands_beside_it(answerer):
    sampled = replace(answerer, choice=ChatChoice(tokens=3, temperature=0.5))
    sampled.answers(PROMPTS, Silent())
    other = replace(sampled, key="other", batch_tokens=1)
    other.answers(PROMPTS, Silent())
    seeds = [dict(zip(prompts, how.seeds, strict=True)) for prompts, how in answerer.backend.asked]
    assert isinstance(answerer.backend.asked[0][1], Sampling)
    assert seeds[0] == {prompt: seed for batch in seeds[1:] for prompt, seed in batch.items()}
    assert len(set(seeds[0].values())) == 3


def test_a_batch_keeps_to_its_tokens_answers_included(answerer):
    replace(answerer, batch_tokens=14).answers(PROMPTS, Silent())
    assert [len(prompts) for prompts, _ in answerer.backend.asked] == [2, 1]


def test_what_memory_does_not_hold_is_asked_in_halves(answerer):
    small = replace(answerer, backend=Backwards(room=1))
    assert small.answers(PROMPTS, Silent()) == said(PROMPTS)
    assert [len(prompts) for prompts, _ in small.backend.asked] == [3, 1, 2, 1, 1]
    with pytest.raises(RuntimeError, match="allocate"):
        replace(answerer, key="none", backend=Backwards(room=0)).answers(PROMPTS, Silent())


def test_a_torn_answer_is_generated_again(answerer, tmp_path):
    answerer.answers(PROMPTS, Silent())
    for path in (tmp_path / "answers").rglob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("answer", "anwser", 1), encoding="utf-8")
    assert answerer.answers(PROMPTS, Silent()) == said(PROMPTS)
    assert len(answerer.backend.asked) == 2
