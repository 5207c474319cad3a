"""Converted checkpoints in the cache: a folder appears whole or not at all, and says what it was made from."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from qeval import paths
from qeval.errors import BrokenRecordError, QevalError
from qeval.files.atomic import atomic_folder, remove_abandoned
from qeval.files.locks import alone
from qeval.identity import digest

_RECORD = "qeval.json"


def build_once(name: str, notes: Sequence[str], make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made where it isn't there yet by one process at a time.

    Args:
        name: The folder's name.
        notes: Sentences that are kept in it.
        make: Fills a temporary folder, which then takes its place.

    Raises:
        QevalError: The cache can't be written.
    """
    folder = paths.home() / "models" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QevalError(f"Cannot write {folder}: {error.strerror or error}.") from error
    with alone(f"models-{name}"):
        if not folder.is_dir():
            remove_abandoned(folder.parent)
            _build(folder, notes, make)
    return folder


def read_notes(folder: Path) -> tuple[str, ...]:
    """Return the notes that `build_once` kept with a folder.

    Raises:
        BrokenRecordError: The record is missing, torn, or was changed by hand.
    """
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        notes = tuple(record["notes"])
        is_whole = record["check"] == _check(notes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenRecordError(f"{path} is missing or torn; delete {folder} and run again.") from error
    if not is_whole:
        raise BrokenRecordError(f"{path} was changed: its checksum does not fit; delete {folder} and run again.")
    return notes


def _build(folder: Path, notes: Sequence[str], make: Callable[[Path], None]) -> None:
    with atomic_folder(folder) as temporary:
        make(temporary)
        record = {"notes": list(notes), "check": _check(notes)}
        (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _check(notes: Sequence[str]) -> str:
    return digest({"notes": list(notes)})
