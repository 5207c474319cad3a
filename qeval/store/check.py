"""A run's folder against itself: every checksum, and the ledger against the files. Nothing is mended."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qeval.errors import BrokenRecordError, QevalError
from qeval.identity import digest_file
from qeval.store.ledger import LEDGER, Finished, read_ledger
from qeval.store.records import verify
from qeval.store.rows import KINDS, SCHEMAS, kind_of, read_index
from qeval.store.texts import read_texts


@dataclass(frozen=True)
class Checked:
    """What was looked at, what is wrong with it, and what a reader should know; all in sentences."""

    looked_at: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folder(out: Path) -> Checked:
    """Look at everything that a finished run left in its folder but its reports.

    Raises:
        UsageError: the folder holds no finished rows.
    """
    found = Checked()
    try:
        index = read_index(out)
    except BrokenRecordError as error:
        found.problems.append(str(error))
        index = {}
    wanted = {out / "rows" / kind / name for kind, names in index.items() for name in names}
    shards = sorted({*(path for kind in KINDS for path in (out / "rows" / kind).glob("*.parquet")), *wanted})
    found.problems.extend(problem for path in shards for problem in _shard_problems(path))
    found.looked_at.append(f"{len(shards)} shards of rows, {len(wanted)} of them the run's")
    _check_texts(out, found)
    _check_ledger(out, wanted, found)
    return found


def _shard_problems(path: Path) -> Iterator[str]:
    try:
        verify(path)
    except BrokenRecordError as error:
        yield str(error)
        return
    try:
        if not pq.read_schema(path).equals(SCHEMAS[kind_of(path)]):
            yield f"{path} has other columns than this version of qeval writes."
    except pa.ArrowInvalid as error:
        yield f"{path} is no Parquet file ({error})."


def _check_texts(out: Path, found: Checked) -> None:
    try:
        texts = read_texts(out)
    except BrokenRecordError as error:
        found.problems.append(str(error))
        return
    if texts is not None:
        found.looked_at.append("the texts of windows and questions")


def _check_ledger(out: Path, wanted: set[Path], found: Checked) -> None:
    """The ledger's records against the files, both ways."""
    try:
        with read_ledger(out) as ledger:
            finished = ledger.finished()
    except FileNotFoundError:
        found.notes.append(f"There is no {LEDGER}; the same command, run again, makes one from the records.")
        return
    except QevalError as error:
        found.problems.append(f"{error} The same command, run again, makes it from the records.")
        return
    found.problems.extend(problem for each in finished for problem in _entry_problems(out, each))
    known = {out / "rows" / each.kind / each.file for each in finished}
    found.problems.extend(f"{path} is not in the ledger." for path in sorted(wanted - known))
    found.looked_at.append(f"{len(finished)} records of the ledger")


def _entry_problems(out: Path, entry: Finished) -> Iterator[str]:
    path = out / "rows" / entry.kind / entry.file
    if not path.exists():
        yield f"{path} is in the ledger and not on disk."
    elif digest_file(path) != entry.sha256:
        yield f"{path} does not have the sha256 that the ledger holds."
