"""The process that something belongs to, so that a dead one's leftovers are told from a live one's work.

A process is known by its host, its number and its start time: numbers are used again. The host's name carries the boot
and the space that process numbers are counted in, so that two containers of one name are two hosts.
"""

import os
import socket
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import psutil

_SAME_START_SECONDS = 2.0
"""Start times are read with a clock that may be set while a process lives."""


@dataclass(frozen=True)
class Owner:
    """A process: its host, its number there, and when it started (seconds since 1970)."""

    host: str
    pid: int
    started: float

    @property
    def token(self) -> str:
        """The owner in a file's name: HOST-PID-START, the host as 8 hex digits."""
        return f"{_short(self.host)}-{self.pid}-{int(self.started)}"

    def __str__(self) -> str:
        """Return how a person would name it."""
        return f"process {self.pid} on {self.host.partition('/')[0]}"


@cache
def _this_process(pid: int) -> Owner:
    return Owner(_host(), pid, psutil.Process(pid).create_time())


def this_process() -> Owner:
    """Return the process that asks."""
    return _this_process(os.getpid())


def is_alive(owner: Owner) -> bool | None:
    """Return whether the process still runs; None for one of another host, which can't be seen from here."""
    return _runs(owner.pid, owner.started) if owner.host == _host() else None


def token_is_alive(token: str) -> bool | None:
    """Return the same as `is_alive`, for an owner in a file's name."""
    host, pid, started = token.split("-")
    return _runs(int(pid), float(started)) if host == _short(_host()) else None


def temporary_prefix(name: str) -> str:
    """Return what a temporary file or folder of this process is called at the start, which becomes `name`."""
    return f".{name}.q-{this_process().token}."


def _runs(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE  # it ended, and its parent has not asked how
        return not is_gone and abs(process.create_time() - started) < _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return False


@cache
def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    numbers = Path("/proc/self/ns/pid")
    parts = [boot.read_text(encoding="ascii").strip()] if boot.exists() else []
    parts += [str(numbers.readlink())] if numbers.is_symlink() else []
    return f"{socket.gethostname()}/{sha256(repr(parts).encode()).hexdigest()[:12]}"


def _short(host: str) -> str:
    return sha256(host.encode()).hexdigest()[:8]
