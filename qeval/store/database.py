"""A small SQLite database that several processes write to, opened whole or begun anew; its errors are sentences.

WAL on local disks. WAL needs memory that all processes share, so on network folders a rollback journal is kept, which
needs file locks that work; where they don't, the error says so.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from qeval.errors import QevalError
from qeval.identity import digest
from qeval.store.locks import alone

_BUSY_SECONDS = 60.0
_CHECKPOINT_PAGES = 64
_NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "lustre", "gpfs", "ceph", "gluster", "beegfs", "fuse.sshfs", "fuse.gcs")

Warn = Callable[[str], None]


def opened(path: Path, schema: str, version: int, warn: Warn) -> sqlite3.Connection:
    """A connection to a database that is whole: begun anew from `schema` where it is missing, broken or older.

    Raises:
        QevalError: it can't be written, or is locked all the time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QevalError(f"Cannot write {path}: {error.strerror or error}.") from error
    with alone(f"ledger-{digest({'path': str(path.resolve())})[:16]}"), told(path):
        connection = connected(path)
        if reason := broken(connection, version):
            warn(f"{path} is torn or of another version ({reason}). It is begun anew; finished records are kept.")
            connection.close()
            for suffix in ("", "-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            connection = connected(path)
        connection.execute(f"PRAGMA journal_mode = {'DELETE' if is_network(path) else 'WAL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute("PRAGMA synchronous = NORMAL")
        if not _version(connection):
            script = f"BEGIN IMMEDIATE; {schema} PRAGMA user_version = {version}; COMMIT"
            connection.executescript(script)
    return connection


def connected(path: Path) -> sqlite3.Connection:
    """A connection that waits its turn; nothing is read yet."""
    with told(path):
        return sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def broken(connection: sqlite3.Connection, version: int) -> str | None:
    """What is wrong with a database of `version`, or None; a new file is one without rows."""
    try:
        found = connection.execute("PRAGMA quick_check").fetchone()[0]
        held = _version(connection)
        is_new = held == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchall()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return str(error)
    if found != "ok":
        return str(found).splitlines()[0]
    return None if is_new or held == version else f"version {held}"


def is_network(path: Path, mounts: Sequence[tuple[str, str]] | None = None) -> bool:
    """Whether a path lies on a folder of another machine; `mounts` are (mount point, type), the system's by default."""
    if mounts is None:
        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    real = path.resolve()
    on = [(len(Path(point).parts), kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(on, default=(0, ""))[1].startswith(_NETWORK)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """SQLite's errors as sentences."""
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
