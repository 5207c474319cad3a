"""Converted checkpoints in the cache: a folder appears whole or not at all, and says what it was made from."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, but exported lazily

from qeval import paths
from qeval.errors import BrokenRecordError, QevalError
from qeval.identity import digest

_RECORD = "qeval.json"
_TEMPORARY = ".making-"


def build_once(name: str, notes: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The cache folder `name`, filled by `make(temporary folder)` when it isn't there yet; `notes` are kept in it.

    One process at a time makes one; what a killed process left is removed first.

    Raises:
        QevalError: the cache can't be written.
    """
    folder = paths.home() / "models" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.parent / ".lock"):
            if not folder.is_dir():
                _build(folder, notes, make)
    except OSError as error:
        raise QevalError(f"Cannot write {folder}: {error.strerror or error}.") from error
    return folder


def read_notes(folder: Path) -> tuple[str, ...]:
    """What `build_once` kept with the folder.

    Raises:
        BrokenRecordError: the record is missing, torn, or was changed by hand.
    """
    path = folder / _RECORD
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        notes = tuple(held["notes"])
        whole = held["check"] == _check(notes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenRecordError(f"{path} is missing or torn; delete {folder} and run again.") from error
    if not whole:
        raise BrokenRecordError(f"{path} was changed: its checksum does not fit; delete {folder} and run again.")
    return notes


def _build(folder: Path, notes: Sequence[str], make: Callable[[Path], None]) -> None:
    # The lock is ours, so any temporary folder belongs to a process that was killed.
    for leftover in folder.parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary = folder.parent / f"{_TEMPORARY}{folder.name}"
    temporary.mkdir()
    try:
        make(temporary)
        record = {"notes": list(notes), "check": _check(notes)}
        (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(notes: Sequence[str]) -> str:
    return digest({"notes": list(notes)})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
