"""Questions to reason about: their forms, and every row that is none."""

import json

import pytest

from qeval.errors import UsageError
from qeval.tasks.reasoning import find_answer, hub_questions, load_questions


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_the_shipped_questions_have_numbers_as_answers():
    found = load_questions(None)
    assert (found.source, len(found.questions)) == ("shipped", 24)
    assert all(question.answer.isdigit() for question in found.questions)
    assert len({question.text for question in found.questions}) == 24


def test_an_answer_is_what_stands_behind_the_hashes_without_commas_in_numbers(tmp_path):
    rows = [
        {"question": " a ", "answer": "3 + 4 = 7\n#### 7"},
        {"question": "b", "answer": "#### 1,234,567"},
        {"question": "c", "answer": 12},
        {"question": "d", "answer": "red, green"},
    ]
    found = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert [question.answer for question in found.questions] == ["7", "1234567", "12", "red, green"]
    assert found.questions[0].message.startswith("a\n\nReason step by step")
    assert found.source == "q.jsonl"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1]", r"q.jsonl, line 2 holds no question"),
        ({"question": "x"}, r"q.jsonl, line 2 has no text as its answer"),
        ({"question": "", "answer": "1"}, r"q.jsonl, line 2 has no text as its question"),
        ({"question": "x", "answer": True}, r"q.jsonl, line 2 has no text as its answer"),
        ({"question": "x", "answer": "6 ####"}, r"q.jsonl, line 2 has nothing behind the ####"),
        ("{", r"q.jsonl, line 2"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, row, reason):
    with pytest.raises(UsageError, match=reason):
        load_questions(write(tmp_path / "q.jsonl", {"question": "x", "answer": "1"}, row))


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--reasoning-questions .*none.jsonl: no such file"):
        load_questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match=r"q.jsonl. is empty"):
        load_questions(write(tmp_path / "q.jsonl", ""))


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [("openai/gsm8k:main:train", "main", "train"), ("org/set:val", None, "val"), ("org/set", None, "test")],
)
def test_a_data_set_of_the_hub_is_named_with_configuration_and_split(source, config, split):
    where = hub_questions(source)
    assert (where.hub_id, where.config, where.split) == (source.partition(":")[0], config, split)


@pytest.mark.parametrize(
    ("texts", "answer", "place"),
    [
        (["is", " 72", "."], "72", (1, 2)),  # the space belongs to its token
        (["72", " or", " 72", "."], "72", (2, 3)),  # the last mention
        (["$\\boxed{", "7", "2", "}$"], "72", (1, 3)),
        (["is", " 172"], "72", None),
        (["is", " 72.", "5"], "72", None),
        (["is", " 72", ".", "5"], "72", None),
        (["is -", "72"], "72", None),
        (["is", " 72."], "72", None),  # it ends inside of a token
        (["($", "72", "0"], "72", None),
        ([], "72", None),
        (["the", " red", " fox"], "red fox", (1, 3)),
        (["=", "7.5"], "7.5", (1, 2)),
    ],
)
def test_the_baselines_own_mention_of_an_answer_is_whole_tokens(texts, answer, place):
    assert find_answer(texts, answer) == place
