"""A small SQLite database that several processes write to, opened whole or begun anew; its errors are sentences.

WAL on local disks. WAL needs memory that all processes share, so on network folders a rollback journal is kept, which
needs file locks that work; where they don't, the error says so.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from qeval.errors import QevalError
from qeval.files.locks import alone
from qeval.identity import digest
from qeval.progress import Notify

_BUSY_SECONDS = 60.0
_CHECKPOINT_PAGES = 64
_NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "lustre", "gpfs", "ceph", "gluster", "beegfs", "fuse.sshfs", "fuse.gcs")


def open_database(path: Path, schema: str, version: int, warn: Notify) -> sqlite3.Connection:
    """Open a database that is whole: begun anew from `schema` where it is missing, broken or older.

    Args:
        path: The database.
        schema: Statements that make its tables.
        version: The version of the schema.
        warn: Hears that it is begun anew, and why.

    Raises:
        QevalError: It can't be written, or is locked all the time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QevalError(f"Cannot write {path}: {error.strerror or error}.") from error
    with alone(f"ledger-{digest({'path': str(path.resolve())})[:16]}"), database_errors(path):
        connection = connect(path)
        if (others := _foreign(connection, schema)) is not None:
            raise QevalError(
                f"{path} is a database of something else (it has a table '{others}'); name another folder."
            )
        if reason := find_damage(connection, version):
            warn(f"{path} is torn or of another version ({reason}). It is begun anew; finished records are kept.")
            connection.close()
            for suffix in ("", "-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            connection = connect(path)
        connection.execute(f"PRAGMA journal_mode = {'DELETE' if is_network(path) else 'WAL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute("PRAGMA synchronous = NORMAL")
        if not _version(connection):
            script = f"BEGIN IMMEDIATE; {schema} PRAGMA user_version = {version}; COMMIT"
            connection.executescript(script)
    return connection


def _foreign(connection: sqlite3.Connection, schema: str) -> str | None:
    """Return a table of a sound database that has none of `schema`'s; None where it may be begun anew."""
    try:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return None  # it is torn
    return names[0] if names and not any(f"CREATE TABLE {name}(" in schema for name in names) else None


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection that waits its turn; nothing is read yet."""
    with database_errors(path):
        return sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Return a connection to look at a database with, also one in a folder where nothing can be written.

    SQLite makes files beside a database even to read it; where it can't, a copy in memory is read instead.
    """
    if os.access(path.parent, os.W_OK):
        return connect(path)
    with database_errors(path), TemporaryDirectory(prefix="qeval-ledger-") as scratch:
        for name in (path.name, f"{path.name}-wal"):
            if path.with_name(name).is_file():
                shutil.copyfile(path.with_name(name), Path(scratch) / name)
        memory = sqlite3.connect(":memory:", isolation_level=None)
        with closing(sqlite3.connect(Path(scratch) / path.name)) as copy:
            copy.backup(memory)
        return memory


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def find_damage(connection: sqlite3.Connection, version: int) -> str | None:
    """Return what is wrong with a database of `version`, or None; a new file is one without rows."""
    try:
        report = connection.execute("PRAGMA quick_check").fetchone()[0]
        file_version = _version(connection)
        is_new = file_version == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchall()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return str(error)
    if report != "ok":
        return str(report).splitlines()[0]
    return None if is_new or file_version == version else f"version {file_version}"


def is_network(path: Path, mounts: Sequence[tuple[str, str]] | None = None) -> bool:
    """Return whether a path lies on another machine; `mounts`: (mount point, type), the system's by default."""
    if mounts is None:
        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    real = path.resolve()
    on = [(len(Path(point).parts), kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(on, default=(0, ""))[1].startswith(_NETWORK)


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as sentences."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise QevalError(
                f"{path} was locked for {_BUSY_SECONDS:.0f} seconds ({error}). If no other qeval works there, its file "
                "system does not keep file locks, as some network folders don't: give an --out on a local disk."
            ) from error
        raise QevalError(f"Cannot write {path}: {error}. What was written before it is kept.") from error
    except sqlite3.DatabaseError as error:
        raise QevalError(f"{path} is torn ({error}); run the same command again, which begins it anew.") from error
