"""The folder that `--out` names: new, empty, or one of qeval's own, so that nothing of anybody else's is replaced.

A folder is qeval's own where a record says so that qeval alone writes: run.json, bench.json, sweep.json, the figures of
a sensitivity map, advice, or a ledger with qeval's tables; or, where a process was killed before the first of these,
files that are named as records are, by key and checksum. Temporary files of killed processes don't count either way.
"""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from qeval.errors import UsageError
from qeval.files.atomic import is_temporary
from qeval.paths import check_place
from qeval.store.attempts import has_marks
from qeval.store.ledger import LEDGER

RECORD_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.(parquet|safetensors)")
"""How files are named whose name holds their key and checksum (`records.write_record`)."""

_JSON = {
    "run.json": "run_version",
    "bench.json": "bench_version",
    "sweep.json": "schema_version",
    "measured.json": "key",
    "sensitivity.json": "schema_version",
    "advice.json": "advice_version",
}
"""Records, and the key that each begins with, by which a torn one is known too."""
_START_BYTES = 64
_TABLES = {"owners", "jobs", "attempts"}
_RECORDS_IN = ("rows/tokens", "rows/items", "rows/drift", "rows/traces", "rows/scores", "rows/timings", "states")
_NAMED_AT_MOST = 3


def check_out(out: Path, holds: str, *, below: bool = False) -> None:
    """Refuse a folder for results that can't be written, or in which others keep something.

    Args:
        out: The folder that --out names.
        holds: What it is for, as the error calls it.
        below: Whether folders of qeval's own below it make it one: those of a sweep's models.

    Raises:
        UsageError: It can't be written, or it holds things that no run of qeval's made; some are named.
    """
    check_place(out, holds)
    if not out.exists():
        return
    others = [path for path in sorted(out.iterdir()) if not is_temporary(path)]
    if not others or _is_own(out):
        return
    if below and all(path.is_dir() and (_is_own(path) or not any(path.iterdir())) for path in others):
        return
    named = ", ".join(path.name for path in others[:_NAMED_AT_MOST]) + (" ..." if len(others) > _NAMED_AT_MOST else "")
    raise UsageError(
        f"--out {out} holds things that qeval did not write ({named}), and results would replace files there; name a "
        f"new or empty folder for {holds}."
    )


def remove_records(folder: Path) -> None:
    """Remove the records in a folder that qeval keeps for a while, and the folder with those below it where empty.

    What is not named as a record is not qeval's, and stays.
    """
    if not folder.is_dir() or folder.is_symlink():
        return
    for base, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if RECORD_NAME.fullmatch(name) or is_temporary(Path(base) / name):
                (Path(base) / name).unlink(missing_ok=True)
        for name in folders:
            _remove_empty(Path(base) / name)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # it holds something, or another process was faster


def _is_own(out: Path) -> bool:
    known = any(_begins_with(out / name, key) for name, key in _JSON.items())
    return known or _has_tables(out) or _has_records(out) or has_marks(out)


def _begins_with(path: Path, key: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return re.match(rb'\{\s*"%b"\s*:' % key.encode(), file.read(_START_BYTES)) is not None


def _has_tables(out: Path) -> bool:
    """Return whether the folder's ledger has qeval's tables, or none yet; it is opened to be read alone."""
    path = out / LEDGER
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        return False
    return not names or names >= _TABLES


def _has_records(out: Path) -> bool:
    return any(RECORD_NAME.fullmatch(path.name) for path in _files(out))


def _files(out: Path) -> Iterator[Path]:
    for name in _RECORDS_IN:
        if (out / name).is_dir():
            yield from (out / name).iterdir()
