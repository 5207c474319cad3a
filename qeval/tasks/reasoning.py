"""Questions to reason about, each with its answer: the shipped ones, a user's JSON lines, or rows of the hub.

A row is an object with `question` and `answer`; other keys are not looked at. Of an answer in GSM8K's form the part
behind `####` is the answer; commas within numbers are left out.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from qeval.errors import UsageError
from qeval.parsing import distinct, parse_json
from qeval.paths import shipped
from qeval.tasks.corpus import fetch_lines, read_text
from qeval.tasks.hub_data import HubText

CUE = "The answer is"
"""The words that ask for the answer."""
DOUBT = ("Wait", "But", "Hmm")
"""Words with which models take back what they thought, as reasoning models write them."""
_SHIPPED = "tasks/reasoning/questions.jsonl"
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+?))?(?::([\w.-]+))?")
_HUB_ROWS = 256
_INSTRUCTION = "Reason step by step, and end with: The answer is"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


class ReasoningQuestion(NamedTuple):
    """A question, its answer, and what errors call it."""

    where: str
    text: str
    answer: str

    @property
    def message(self) -> str:
        """The text that the model is asked."""
        return f"{self.text}\n\n{_INSTRUCTION} ..."


class QuestionSet(NamedTuple):
    """Questions, the name of where they come from, and the sha256 of their text."""

    source: str
    questions: tuple[ReasoningQuestion, ...]
    sha256: str


def load_questions(source: str | None) -> QuestionSet:
    """Return the questions of a source.

    Args:
        source: A file of JSON lines, or a hub id `ORG/NAME[[:CONFIG]:SPLIT]`; None for the shipped ones.

    Raises:
        UsageError: There is no such source, or a row is none; it says which and why.
    """
    where = hub_questions(source)
    if where is not None:
        text, name = fetch_questions(where), where.hub_id
    elif source is None:
        text, name = read_text(shipped(_SHIPPED)), "shipped"
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UsageError(
                f"--reasoning-questions {source}: no such file; give a file of JSON lines, or a data set of the hub as "
                "ORG/NAME:CONFIG:SPLIT."
            )
        text, name = read_text(path), path.name
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    questions = tuple(_question(line, f"{name}, line {number}") for number, line in lines)
    return QuestionSet(name, questions, hashlib.sha256(text.encode()).hexdigest())


def find_answer(texts: Sequence[str], answer: str) -> tuple[int, int] | None:
    """Return which tokens of a text are its last mention of an answer: the first, and the first behind it.

    None where it is not mentioned, is a part of a longer number or word, or begins or ends inside of a token.

    Args:
        texts: The text of each token.
        answer: The answer.

    >>> find_answer(["is", " **", "7", "2", "**"], "72"), find_answer(["17", "2"], "72")
    ((2, 4), None)
    """
    ends = list(accumulate(map(len, texts)))
    starts = [end - len(text) for end, text in zip(ends, texts, strict=True)]
    matches = list(re.finditer(rf"(?<![\w.-]){re.escape(answer)}(?!\w|[.,]\d)", "".join(texts)))
    if not matches or matches[-1].end() not in ends:
        return None
    # white space in front of the answer may be a part of its first token
    start, end = matches[-1].span()
    begun = bisect_right(starts, start) - 1
    return (begun, ends.index(end) + 1) if not texts[begun][: start - starts[begun]].strip() else None


def hub_questions(source: str | None) -> HubText | None:
    """Return the data set that a source names; None where it is a file, or the shipped questions."""
    if source is None or Path(source).expanduser().exists():
        return None
    match = _HUB_ID.fullmatch(source)
    if match is None or Path(match[1]).suffix in (".jsonl", ".json", ".txt"):
        return None
    config, split = (match[2], match[3]) if match[3] else (None, match[2])
    return HubText(match[1], config, split or "test", "question", "\n", documents=_HUB_ROWS)


def fetch_questions(where: HubText) -> str:
    """Return the rows of a data set as JSON lines.

    Raises:
        UsageError: It can't be loaded.
    """
    return fetch_lines(where, ("question", "answer"), "Give a file of JSON lines as --reasoning-questions instead.")


def _question(line: str, where: str) -> ReasoningQuestion:
    row = parse_json(line, where, distinct)
    if not isinstance(row, dict):
        raise UsageError(f"{where} holds no question: it must be an object with a question and an answer.")
    for key in ("question", "answer"):
        value = row.get(key)
        is_number = key == "answer" and isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, str) and value.strip()) and not is_number:
            raise UsageError(f"{where} has no text as its {key}.")
    answer = _THOUSANDS.sub("", str(row["answer"]).rpartition("####")[2].strip())
    if not answer:
        raise UsageError(f"{where} has nothing behind the #### of its answer.")
    return ReasoningQuestion(where, str(row["question"]).strip(), answer)
