"""One process at a time makes what is kept for all: a lock a key, let go by the system when its holder dies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from qeval import paths
from qeval.errors import QevalError

Told = Callable[[str], None]


@contextmanager
def alone(key: str, waiting: Told | None = None) -> Iterator[None]:
    """Be the one process of this cache (`QEVAL_HOME`) that works on `key`, a name that files may have.

    `waiting` hears a sentence when another is at it. The lock is the kernel's (`flock`): it goes with the process,
    however that ends. The file stays, empty.

    Raises:
        QevalError: the cache can't be written, or its file system knows no locks.
    """
    path = paths.home() / "locks" / f"{key}.lock"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is not None:
                waiting(f"Waiting for another process, which makes {key}.")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise QevalError(f"Cannot lock {path}: {getattr(error, 'strerror', None) or error}.") from error
    try:
        yield
    finally:
        lock.release()
