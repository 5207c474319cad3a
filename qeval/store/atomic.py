"""Files appear whole or not at all: a temporary file in the same folder, fsync, replace."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from qeval.errors import QevalError

_READABLE = 0o644


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends, and is removed when the block raises.

    Raises:
        QevalError: the file can't be written, say because the disk is full; it names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
    except OSError as error:
        raise QevalError(f"Cannot write {path}: {error.strerror or error}.") from error
    try:
        yield temporary
        temporary.chmod(_mode(path))  # made for its owner alone, as temporary files are
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise QevalError(
            f"Cannot write {path}: {error.strerror or error}. What was written before it is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def _mode(path: Path) -> int:
    """The permissions of the file that is there, or those of a new one."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else _READABLE


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
