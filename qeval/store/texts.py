"""The texts behind rows: the tokens of every scored window, and every question.

Rows hold token ids and question numbers alone. `OUT/texts/windows.parquet` and `OUT/texts/questions.parquet` let a
reader of a finished run see them without the model's tokenizer or the harness. They change no number, so they
have no key: each is replaced whole by the last run into OUT.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qeval.errors import BrokenRecordError
from qeval.files.atomic import atomic_path
from qeval.store.schema import READ_ERRORS

TEXTS_VERSION = 1

_KEY = b"texts_version"
_VERSION = {_KEY: str(TEXTS_VERSION).encode()}
WINDOWS_SCHEMA = pa.schema(
    [
        pa.field("window", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),  # all ids that were run, BOS included
        pa.field("texts", pa.list_(pa.string()), nullable=False),  # one a token; joined they are the window's text
    ],
    metadata=_VERSION,
)
QUESTIONS_SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("question", pa.string(), nullable=False),  # as the prompt ends with it, examples left out
        pa.field("choices", pa.list_(pa.string()), nullable=False),
    ],
    metadata=_VERSION,
)


@dataclass(frozen=True)
class WindowText:
    """A window's token ids and the text of each; a character of several tokens stands at the last of them."""

    window: int
    tokens: tuple[int, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse texts that are not one a token."""
        if len(self.tokens) != len(self.texts):
            raise ValueError(f"Window {self.window} has {len(self.tokens)} tokens and {len(self.texts)} texts.")


@dataclass(frozen=True)
class QuestionText:
    """A question as the prompt ends with it, and its choices."""

    task: str
    subject: str
    item: int
    question: str
    choices: tuple[str, ...]


class Texts:
    """The texts of one run; a window or a question is turned into Python values when it is asked for."""

    def __init__(self, windows: pa.Table, questions: pa.Table) -> None:
        """Tables of the schemas above."""
        self._windows, self._questions = windows, questions
        self._tasks: dict[str, dict[tuple[str, int], QuestionText]] = {}
        self._rows = {window: row for row, window in enumerate(windows["window"].to_pylist())}

    def window(self, window: int) -> WindowText | None:
        """Return the texts of a window's tokens, or None where the run kept none of it."""
        row = self._rows.get(window)
        if row is None:
            return None
        texts = self._windows.slice(row, 1).to_pylist()[0]
        return WindowText(window, tuple(texts["tokens"]), tuple(texts["texts"]))

    def task(self, task: str) -> dict[tuple[str, int], QuestionText]:
        """Return the questions of a task by (subject, item); empty where the run kept none."""
        if task not in self._tasks:
            rows = [row for row in self._questions.to_pylist() if row["task"] == task]
            self._tasks[task] = {
                (row["subject"], row["item"]): QuestionText(**row | {"choices": tuple(row["choices"])}) for row in rows
            }
        return self._tasks[task]


def write_texts(out: Path, windows: Iterable[WindowText], questions: Iterable[QuestionText]) -> None:
    """Replace the texts in the run folder `out`."""
    for schema, nouns in ((WINDOWS_SCHEMA, windows), (QUESTIONS_SCHEMA, questions)):
        table = pa.Table.from_pylist([vars(noun) for noun in nouns], schema=schema)
        with atomic_path(_path(out, schema)) as temporary:
            pq.write_table(table, temporary, compression="zstd")


def text_files(out: Path) -> list[Path]:
    """Return the files of texts that lie in the run folder `out`."""
    return [path for path in (_path(out, WINDOWS_SCHEMA), _path(out, QUESTIONS_SCHEMA)) if path.is_file()]


def read_texts(out: Path) -> Texts | None:
    """Read the texts that the run in `out` kept; None where it kept none, as runs of qeval 0.1 did.

    Raises:
        BrokenRecordError: A file is torn, foreign, or there without the other.
    """
    there = [_path(out, schema).exists() for schema in (WINDOWS_SCHEMA, QUESTIONS_SCHEMA)]
    return Texts(_read(out, WINDOWS_SCHEMA), _read(out, QUESTIONS_SCHEMA)) if any(there) else None


def _path(out: Path, schema: pa.Schema) -> Path:
    return out / "texts" / ("windows.parquet" if schema is WINDOWS_SCHEMA else "questions.parquet")


def _read(out: Path, schema: pa.Schema) -> pa.Table:
    path = _path(out, schema)
    try:
        table = pq.read_table(path)
    except READ_ERRORS as error:
        raise BrokenRecordError(f"{path} is missing or torn; run the same command again to make it.") from error
    if not table.schema.equals(schema) or (table.schema.metadata or {}).get(_KEY) != _VERSION[_KEY]:
        raise BrokenRecordError(
            f"{path} has other columns than this version of qeval writes; run the same command again to make it."
        )
    return table
