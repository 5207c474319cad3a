"""Files appear whole or not at all: a temporary file in the same folder, fsync, replace.

A temporary file's name says whose it is (`.NAME.q-OWNER.XXXX`), so that what killed processes left can be removed while
others write into the same folder.
"""

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from qeval.errors import QevalError
from qeval.files.process_id import temporary_prefix, token_is_alive

_READABLE, _FOLDER, _PRIVATE = 0o644, 0o755, 0o600
"""Permissions of new files and folders: temporary ones are made for their owner alone."""
_TEMPORARY = re.compile(r"\..+\.q-([0-9a-f]{8}-\d+-\d+)\.\w+")
_ABANDONED_SECONDS = 24 * 3600
"""The age at which a file counts as left behind where its owner can't be seen: another host's."""


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, removed when the block ends unless it was published.

    Raises:
        QevalError: The file can't be written, say because the disk is full; it names `path`.
    """
    # Named before it is made: a signal between the two would leave a file that nothing removes.
    temporary = _temporary_path(path)
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _PRIVATE))
        yield temporary
    except OSError as error:
        raise QevalError(
            f"Cannot write {path}: {error.strerror or error}. What was written before it is kept."
        ) from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):  # published, or never made
            temporary.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Let a written temporary file take the place of `path`, at once and for good."""
    temporary.chmod(_mode(path))
    sync(temporary)
    temporary.replace(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` when the block ends, and is removed if it raises.

    Raises:
        QevalError: The file can't be written, say because the disk is full; it names `path`.
    """
    with temporary_file(path) as temporary:
        yield temporary
        publish(temporary, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` when the block ends, and is removed when the block raises.

    Raises:
        QevalError: It can't be written; the error names `path`.
    """
    temporary = _temporary_path(path)
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(_PRIVATE | stat.S_IXUSR)
            yield temporary
            for part in temporary.iterdir():
                sync(part)
            temporary.chmod(_FOLDER)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_path(path: Path) -> Path:
    return path.parent / f"{temporary_prefix(path.name)}{secrets.token_hex(4)}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise QevalError(f"Cannot write {path}: {error.strerror or error}.") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose content goes to `path`, a file that a user named, when the block ends.

    A plain file is replaced as in `atomic_path`. A link is followed, and what it leads to is replaced. A pipe, a device
    (`/dev/stdout`) and a file that has other names too are written in place, since replacing would cut them off.

    Raises:
        QevalError: It can't be written; it names `path`.
    """
    real = Path(os.path.realpath(path))
    if not real.exists() or _is_plain(real):
        with atomic_path(real) as temporary:
            yield temporary
        return
    with TemporaryDirectory(prefix="qeval-") as folder:
        part = Path(folder) / "part"
        yield part
        try:
            with part.open("rb") as source, path.open("r+b" if real.is_file() else "wb", buffering=0) as target:
                if real.is_file():
                    target.truncate()
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise QevalError(f"Cannot write {path}: {error.strerror or error}.") from error


def write_output(path: Path, text: str) -> None:
    """Write `text`, as UTF-8, to a file that a user named, as `output_file` does."""
    with output_file(path) as temporary:
        temporary.write_bytes(text.encode())


def is_temporary(path: Path) -> bool:
    """Return whether a file or folder is named as the temporary ones here are."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _is_plain(path: Path) -> bool:
    status = path.stat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def sync(path: Path) -> None:
    """Have what was written to a file on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove the temporary files and folders below `folder` that dead processes left, and say which.

    A live process's are left alone; those of other hosts, which can't be seen from here, are left for a day.
    """
    walked = ((Path(base), [*folders, *files]) for base, folders, files in os.walk(folder))
    abandoned = [base / name for base, names in walked for name in names if _is_abandoned(base / name)]
    for path in abandoned:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another start may be removing it too
        else:
            path.unlink(missing_ok=True)
    return abandoned


def _is_abandoned(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    alive = token_is_alive(match[1]) if match else None
    if alive is not None or not match:
        return alive is False
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _mode(path: Path) -> int:
    """Return the permissions of the file that is there, or those of a new one."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else _READABLE
