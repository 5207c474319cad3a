"""Hashes of large files, remembered, so that the second run of a command need not read them again.

A record lies in the cache under `hashes/` and carries its own checksum. It is named by the files' paths, devices,
inodes, sizes, times of the last change of content and of anything at all (mtime and ctime, which no program sets), and
by a sample of their bytes: archives, images and `cp -p` give other weights the same path, size and mtime.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from qeval import paths
from qeval.errors import BrokenRecordError
from qeval.files.atomic import write_text
from qeval.identity import digest, digest_file

_VERSION = 2
"""Part of every key: raised when a stamp says something else."""
_SAMPLES, _SAMPLE_BYTES = 128, 1 << 13
"""A MiB of a file is looked at: all of a small one."""
_IN_PROCESS: dict[str, str] = {}
"""The hashes that this process computed, by what the files were."""


def cached_hash(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return the hash that `compute` gives of `files`, computed once for what they are now.

    Files that change while they are read have their hash computed again the next time.

    Args:
        kind: What the hash is of, beside the files.
        files: The files.
        compute: Reads them and returns their hash.

    Raises:
        BrokenRecordError: The record is torn or was changed by hand; it names the file.
        QevalError: The record can't be written.
    """
    key = _key(kind, files)
    record = paths.home() / "hashes" / f"{key}.json"
    if record.exists():
        return _read(record, key)
    value = compute()
    if _key(kind, files) == key:
        write_text(record, json.dumps({"sha256": value, "check": _check(key, value)}) + "\n")
    return value


def process_hash(path: Path) -> str:
    """Return a file's sha256, read once in this process for what the file is now."""
    key = _key("process", [path])
    if key not in _IN_PROCESS:
        value = digest_file(path)
        if _key("process", [path]) != key:
            return value
        _IN_PROCESS[key] = value
    return _IN_PROCESS[key]


def _key(kind: str, files: Sequence[Path]) -> str:
    return digest({"kind": kind, "version": _VERSION, "files": [_stamp(path) for path in files]})


def _stamp(path: Path) -> list[str | int]:
    # The link is followed: hub snapshots are links to blobs, and a blob is what was hashed.
    real = path.resolve()
    status = real.stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [str(real), status.st_dev, status.st_ino, status.st_size, *times, _sample(real, status.st_size)]


def _sample(path: Path, size: int) -> str:
    """Return the sha256 of a small file's bytes, or of the ends of a large one and of places spread over it."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        starts = [0]
        length = size
    else:
        step = (size - _SAMPLE_BYTES) / (_SAMPLES - 1)
        starts = [round(step * place) for place in range(_SAMPLES)]
        length = _SAMPLE_BYTES
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            sha.update(file.read(length))
    return sha.hexdigest()


def _check(key: str, value: str) -> str:
    return digest({"key": key, "sha256": value})


def _read(record: Path, key: str) -> str:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        value = content["sha256"]
        whole = content["check"] == _check(key, value)
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenRecordError(f"{record} is torn; delete it and run again.") from error
    if not whole:
        raise BrokenRecordError(f"{record} was changed: its checksum does not fit it; delete it and run again.")
    return str(value)
