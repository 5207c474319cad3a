"""Files appear whole or not at all: a temporary file in the same folder, fsync, replace.

A temporary file's name says whose it is (`.NAME.q-OWNER.XXXX`), so that what killed processes left can be removed while
others write into the same folder.
"""

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from qeval.errors import QevalError
from qeval.owners import temporary_prefix, token_is_alive

_READABLE = 0o644
_OURS = re.compile(r"\..+\.q-([0-9a-f]{8}-\d+-\d+)\.\w+")
_UNOWNED = re.compile(r"(\.[0-9a-f]{32}\.part\.\w+)|([0-9a-f]{32}\.part)")
"""What was left of records before names said whose they are."""
_ABANDONED_SECONDS = 24 * 3600
"""The age at which a file counts as left behind where its owner can't be seen: another host's, or nobody's."""


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` to write to, removed when the block ends unless it was published.

    Raises:
        QevalError: the file can't be written, say because the disk is full; it names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=temporary_prefix(path.name), delete=False) as file:
            temporary = Path(file.name)
    except OSError as error:
        raise QevalError(f"Cannot write {path}: {error.strerror or error}.") from error
    try:
        yield temporary
    except OSError as error:
        raise QevalError(
            f"Cannot write {path}: {error.strerror or error}. What was written before it is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Let a written temporary file take the place of `path`, at once and for good."""
    temporary.chmod(_mode(path))  # made for its owner alone, as temporary files are
    sync(temporary)
    temporary.replace(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends, and is removed when the block raises.

    Raises:
        QevalError: the file can't be written, say because the disk is full; it names `path`.
    """
    with temporary_file(path) as temporary:
        yield temporary
        publish(temporary, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Have what was written to a file on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files and folders below `folder` that dead processes left, and say which.

    A live process's are left alone; those of other hosts, which can't be seen from here, are left for a day.
    """
    walked = ((Path(base), [*folders, *files]) for base, folders, files in os.walk(folder))
    found = [base / name for base, names in walked for name in names if _is_left(base / name)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another start may be removing it too
        else:
            path.unlink(missing_ok=True)
    return found


def _is_left(path: Path) -> bool:
    ours = _OURS.fullmatch(path.name)
    alive = token_is_alive(ours[1]) if ours else None
    if alive is not None or not (ours or _UNOWNED.fullmatch(path.name)):
        return alive is False
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _mode(path: Path) -> int:
    """The permissions of the file that is there, or those of a new one."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else _READABLE
