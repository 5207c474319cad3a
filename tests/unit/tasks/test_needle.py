"""Haystacks: what is in them, how long they are, and what their questions share."""

import re

import pytest

from qeval.errors import UsageError
from qeval.tasks.needle import depths_of, write_haystack
from tests.fixtures.tiny import tiny_tokenizer

LENGTH, DEPTHS = 1500, depths_of(5)
TOKENIZER = tiny_tokenizer(bos=True)


def haystack(length=LENGTH, number=0, seed=0, bos="auto"):
    return write_haystack(TOKENIZER, bos, length, number, DEPTHS, seed)


def texts(made):
    return [(TOKENIZER.decode(prompt), TOKENIZER.decode(answer)) for prompt, answer in made.pairs]


def test_a_seed_writes_one_text_and_every_number_another():
    assert haystack() == haystack()
    others = [{"number": 1}, {"seed": 1}, {"length": LENGTH - 1}]
    assert len({haystack(**changed).pairs for changed in ({}, *others)}) == 4


def test_it_is_as_long_as_fits():
    for length in (900, 1500, 4000):
        longest = max(len(prompt) + len(answer) for prompt, answer in haystack(length).pairs)
        assert length - 100 < longest <= length


def test_each_code_stands_once_at_its_depth_and_each_question_asks_for_its_own():
    for depth, (prompt, answer) in zip(DEPTHS, texts(haystack()), strict=True):
        text, _, question = prompt.rpartition("\n\n")
        key = re.fullmatch(r"The code of the (\w+ \w+) is", question)[1]
        assert re.fullmatch(r" [0-9]{5}", answer)
        assert text.count(answer) == 1
        assert prompt.count(f"The code of the {key} is{answer}.") == 1
        sentences = text.split("\n\n")[1].split(". ")
        place = next(i for i, sentence in enumerate(sentences) if key in sentence)
        assert place / (len(sentences) - 1) == pytest.approx(depth, abs=0.05)


def test_the_questions_of_a_haystack_share_all_of_it():
    prompts = [prompt for prompt, _ in haystack().pairs]
    shared = next(place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert max(map(len, prompts)) - shared < 40
    assert all(prompt[0] == TOKENIZER.bos_token_id for prompt in prompts)
    assert haystack(bos="never").pairs[0][0][0] != TOKENIZER.bos_token_id


def test_a_length_that_its_needles_do_not_fit_is_refused():
    with pytest.raises(
        UsageError, match=r"--needle-lengths 300: 5 needles with 10 sentences between them take \d+ tok"
    ):
        haystack(300)
