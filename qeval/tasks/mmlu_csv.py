"""MMLU's original csv layout: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, question, four choices, letter, no header.

Every cell stays text: a choice may read `None`, `NA` or `2.50`. A byte order mark, which spreadsheets put in front, is
no part of the first question.
"""

import csv
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from qeval.errors import UsageError, unknown
from qeval.tasks.decoding import decode

LETTERS = "ABCD"


@dataclass(frozen=True)
class CsvQuestion:
    """One question as its file has it."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's examples and questions."""

    name: str
    dev: tuple[CsvQuestion, ...]
    test: tuple[CsvQuestion, ...]


def read_subjects(folder: Path, names: Sequence[str], shots: int) -> list[Subject]:
    """Read the subjects in a folder, in alphabetical order.

    Args:
        folder: Holds `dev` and `test`.
        names: Which subjects; all where it is empty.
        shots: Examples that each subject must have.

    Raises:
        UsageError: There is no such folder, an unknown subject (the nearest are listed), examples missing or fewer than
            `shots`, or a broken row (which file, which line).
    """
    subjects = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not subjects:
        raise UsageError(f"'{folder}' holds no MMLU questions: there is no test/SUBJECT_test.csv in it.")
    for name in names:
        if name not in subjects:
            raise unknown(f"subject in '{folder}'", name, subjects)
    return [_read_subject(folder, name, shots) for name in subjects if not names or name in names]


def _read_subject(folder: Path, name: str, shots: int) -> Subject:
    dev_path = folder / "dev" / f"{name}_dev.csv"
    if shots and not dev_path.exists():
        raise UsageError(f"{dev_path} is missing: it holds the examples for --shots {shots}.")
    dev = _read_rows(dev_path) if shots else ()
    if len(dev) < shots:
        raise UsageError(f"{dev_path} holds {len(dev)} examples, fewer than --shots {shots}.")
    test = _read_rows(folder / "test" / f"{name}_test.csv")
    if not test:
        raise UsageError(f"{folder / 'test' / f'{name}_test.csv'} holds no questions.")
    return Subject(name, dev, test)


def _read_rows(path: Path) -> tuple[CsvQuestion, ...]:
    """Read the rows of a file; a broken one is named by the line where it starts, for a cell may hold line breaks."""
    rows: list[CsvQuestion] = []
    line = 1
    try:
        text = decode(path.read_bytes().removeprefix(BOM_UTF8), path)
        reader = csv.reader(StringIO(text, newline=""), strict=True)
        for cells in reader:
            rows.append(_row(cells, f"{path}, line {line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}, line {line}: the row's quotes or commas are broken ({error}).") from error
    except OSError as error:
        raise UsageError(f"Cannot read '{path}': {error.strerror or error}.") from error
    return tuple(rows)


def _row(cells: list[str], where: str) -> CsvQuestion:
    if len(cells) != len(LETTERS) + 2:
        raise UsageError(f"{where}: a row has 6 cells (question, four choices, letter), not {len(cells)}.")
    question, *choices, letter = cells
    if not question.strip() or any(not choice.strip() for choice in choices):
        raise UsageError(f"{where}: the question or a choice is empty.")
    if letter.strip() not in LETTERS or len(letter.strip()) != 1:
        raise UsageError(f"{where}: the answer must be one of A, B, C, D, not '{letter}'.")
    return CsvQuestion(question, tuple(choices), LETTERS.index(letter.strip()))
