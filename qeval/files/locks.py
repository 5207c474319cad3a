"""One process at a time makes what is kept for all: a lock a key, let go by the system when its holder dies."""

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from qeval import paths
from qeval.errors import QevalError
from qeval.progress import Notify


@contextmanager
def alone(key: str, waiting: Notify | None = None) -> Iterator[None]:
    """Be the one process of this cache (`QEVAL_HOME`) that works on `key`.

    The lock is the kernel's (`flock`): it goes with the process, however that ends. The file stays, empty.

    Args:
        key: What is worked on, a name that files may have.
        waiting: Hears a sentence when another process is at it.

    Raises:
        QevalError: The cache can't be written, or its file system knows no locks.
    """
    path = paths.home() / "locks" / f"{key}.lock"
    lock = FileLock(path)

    # ask once without waiting, so that who waits can say so
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
