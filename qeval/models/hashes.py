"""Hashes of large files, remembered, so that the second run of a command need not read them again.

A record lies in the cache under `hashes/`, named by the files' paths, sizes and times; it carries its own checksum.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from qeval import paths
from qeval.errors import BrokenRecordError, QevalError
from qeval.identity import digest
from qeval.owners import temporary_prefix


def remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """The hash that `compute` gives of `files`, computed once for their present path, size and modification time.

    Raises:
        BrokenRecordError: the record is torn or was changed by hand; it names the file.
        QevalError: the record can't be written.
    """
    key = digest({"kind": kind, "files": [_stamp(path) for path in files]})
    record = paths.home() / "hashes" / f"{key}.json"
    if record.exists():
        return _read(record, key)
    value = compute()
    _write(record, json.dumps({"sha256": value, "check": _check(key, value)}) + "\n")
    return value


def _stamp(path: Path) -> list[str | int]:
    # The link is followed: hub snapshots are links to blobs, and a blob is what was hashed.
    real = path.resolve()
    status = real.stat()
    return [str(real), status.st_size, status.st_mtime_ns]


def _check(key: str, value: str) -> str:
    return digest({"key": key, "sha256": value})


def _read(record: Path, key: str) -> str:
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        value = held["sha256"]
        whole = held["check"] == _check(key, value)
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenRecordError(f"{record} is torn; delete it and run again.") from error
    if not whole:
        raise BrokenRecordError(f"{record} was changed: its checksum does not fit it; delete it and run again.")
    return str(value)


def _write(record: Path, text: str) -> None:
    temporary: Path | None = None
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(
            "w", dir=record.parent, prefix=temporary_prefix(record.name), delete=False, encoding="utf-8"
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(record)
    except OSError as error:
        raise QevalError(f"Cannot write {record}: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
