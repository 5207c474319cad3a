"""The largest resident memory of this process in a phase of its work.

Linux keeps it (VmHWM) and lets a process set it back (`/proc/self/clear_refs`, see proc(5)), which costs the phase
nothing; elsewhere a thread looks every few milliseconds and may miss a short peak.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
_LOOK_SECONDS = 0.005
_KIB = 1024


@contextmanager
def peak_rss() -> Iterator[Callable[[], int]]:
    """Yield what returns the block's peak in bytes so far."""
    if _reset():
        yield _highest
        return
    with _sampled() as read:
        yield read


def rss_bytes() -> int:
    """Return the resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def _reset() -> bool:
    """Return whether the system's mark could be set back to what is resident now."""
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _highest() -> int:
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM:"))


@contextmanager
def _sampled() -> Iterator[Callable[[], int]]:
    highest, ended = [rss_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            highest[0] = max(highest[0], rss_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: max(highest[0], rss_bytes())
    finally:
        ended.set()
        thread.join()
