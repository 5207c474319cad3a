"""A run's folder against itself: every checksum, and the ledger against the files. Nothing is mended."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qeval.errors import BrokenRecordError, QevalError
from qeval.files.records import verify_record
from qeval.identity import digest_file
from qeval.store.ledger import LEDGER, Finished, read_ledger
from qeval.store.rows import ROW_KINDS, has_known_columns, read_index, row_kind_of
from qeval.store.texts import read_texts


@dataclass(frozen=True)
class FolderCheck:
    """The findings of a check: what was looked at, what is wrong, what a reader should know; in sentences."""

    looked_at: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folder(out: Path) -> FolderCheck:
    """Look at everything that a finished run left in its folder but its reports.

    Raises:
        UsageError: The folder holds no finished rows.
    """
    result = FolderCheck()
    try:
        index = read_index(out)
    except BrokenRecordError as error:
        result.problems.append(str(error))
        index = {}
    wanted = {out / "rows" / kind / name for kind, names in index.items() for name in names}
    shards = sorted({*(path for kind in ROW_KINDS for path in (out / "rows" / kind).glob("*.parquet")), *wanted})
    result.problems.extend(problem for path in shards for problem in _shard_problems(path))
    result.looked_at.append(f"{len(shards)} shards of rows, {len(wanted)} of them the run's")
    _check_texts(out, result)
    _check_ledger(out, wanted, result)
    return result


def _shard_problems(path: Path) -> Iterator[str]:
    try:
        verify_record(path)
    except BrokenRecordError as error:
        yield str(error)
        return
    try:
        if not has_known_columns(row_kind_of(path), pq.read_schema(path)):
            yield f"{path} has other columns than this version of qeval writes."
    except pa.ArrowInvalid as error:
        yield f"{path} is no Parquet file ({error})."


def _check_texts(out: Path, result: FolderCheck) -> None:
    try:
        texts = read_texts(out)
    except BrokenRecordError as error:
        result.problems.append(str(error))
        return
    if texts is not None:
        result.looked_at.append("the texts of windows and questions")


def _check_ledger(out: Path, wanted: set[Path], result: FolderCheck) -> None:
    """Compare the ledger's records with the files, both ways."""
    try:
        with read_ledger(out) as ledger:
            finished = ledger.finished()
    except FileNotFoundError:
        result.notes.append(f"There is no {LEDGER}; the same command, run again, makes one from the records.")
        return
    except QevalError as error:
        result.problems.append(f"{error} The same command, run again, makes it from the records.")
        return
    result.problems.extend(problem for each in finished for problem in _entry_problems(out, each))
    known = {out / "rows" / each.kind / each.file for each in finished}
    result.problems.extend(f"{path} is not in the ledger." for path in sorted(wanted - known))
    result.looked_at.append(f"{len(finished)} records of the ledger")


def _entry_problems(out: Path, entry: Finished) -> Iterator[str]:
    path = out / "rows" / entry.kind / entry.file
    if not path.exists():
        yield f"{path} is in the ledger and not on disk."
    elif digest_file(path) != entry.sha256:
        yield f"{path} does not have the sha256 that the ledger holds."
