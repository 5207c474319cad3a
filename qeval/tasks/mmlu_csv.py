"""MMLU's original csv layout: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, question, four choices, letter, no header.

Every cell stays text: a choice may read `None`, `NA` or `2.50`.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qeval.errors import UsageError, unknown

LETTERS = "ABCD"


@dataclass(frozen=True)
class Row:
    """One question as it stands in its file."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's examples and questions."""

    name: str
    dev: tuple[Row, ...]
    test: tuple[Row, ...]


def read_subjects(folder: Path, names: Sequence[str], shots: int) -> list[Subject]:
    """The subjects in `folder`, all of them or those named, in alphabetical order.

    Raises:
        UsageError: no such folder, an unknown subject (the nearest are listed), examples missing or fewer than
            `shots`, or a broken row (which file, which line).
    """
    found = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not found:
        raise UsageError(f"'{folder}' holds no MMLU questions: there is no test/SUBJECT_test.csv in it.")
    for name in names:
        if name not in found:
            raise unknown(f"subject in '{folder}'", name, found)
    return [_read_subject(folder, name, shots) for name in found if not names or name in names]


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


def _read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a file; a broken one is named by the line where it starts, for a cell may hold line breaks."""
    rows: list[Row] = []
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                rows.append(_row(cells, f"{path}, line {line}"))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}, line {line}: the row's quotes or commas are broken ({error}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as csv: {error}.") from error
    return tuple(rows)


def _row(cells: list[str], where: str) -> Row:
    if len(cells) != len(LETTERS) + 2:
        raise UsageError(f"{where}: a row has 6 cells (question, four choices, letter), not {len(cells)}.")
    question, *choices, letter = cells
    if not question.strip() or any(not choice.strip() for choice in choices):
        raise UsageError(f"{where}: the question or a choice is empty.")
    if letter.strip() not in LETTERS or len(letter.strip()) != 1:
        raise UsageError(f"{where}: the answer must be one of A, B, C, D, not '{letter}'.")
    return Row(question, tuple(choices), LETTERS.index(letter.strip()))
