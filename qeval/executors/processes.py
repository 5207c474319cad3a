"""Processes of this machine that help with a run. Each is sent one message, works, and ends; none outlives its parent.

A helper that fails or is killed costs the run nothing but its help: jobs are claimed in the run's ledger, and what a
helper did not finish is done by whoever is left.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from qeval.errors import QevalError
from qeval.progress import Progress

_CONTEXT = multiprocessing.get_context("spawn")  # torch's threads do not live through a fork
_STOP_SECONDS = 30.0
_TERMINATED = 143

Receive = Callable[[], Any]
WorkerFunction = Callable[..., None]


class Stopped(BaseException):
    """The helper was told to stop: raised wherever it is, so that temporary files go and claims are given back."""


class Helpers:
    """The processes that help, and what they are waiting to hear."""

    def __init__(self, running: Sequence[tuple[BaseProcess, Connection]]) -> None:
        """Processes, each with this end of its pipe."""
        self._running = running

    def tell(self, message: Any) -> None:
        """Send every helper what it waits for; one that has ended already is not there to hear it."""
        for process, connection in self._running:
            if process.is_alive():
                with suppress(BrokenPipeError):  # it ended just now
                    connection.send(message)

    def stop(self) -> list[str]:
        """End every helper, and say what went wrong with those that had ended before."""
        reasons = [_reason(process, connection) for process, connection in self._running if not process.is_alive()]
        for process, _ in self._running:
            process.terminate()
        for process, connection in self._running:
            process.join(_STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        return [reason for reason in reasons if reason]


@contextmanager
def helping(work: WorkerFunction, arguments: Sequence[tuple[Any, ...]], progress: Progress) -> Iterator[Helpers]:
    """Start a process for each of `arguments`, which runs `work(*arguments, receive)` until the block ends.

    `receive` waits for the message of `Helpers.tell`. A helper that ended badly is told as a warning.
    """
    running = []
    for each in arguments:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_help, args=(work, each, theirs), daemon=True)
        with deaf_to_ctrl_c():
            process.start()
        theirs.close()
        running.append((process, ours))
    helpers = Helpers(running)
    try:
        yield helpers
    finally:
        for reason in helpers.stop():
            progress.warn(reason)


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; those started here ignore it from the first, and are told by us."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(process: BaseProcess, connection: Connection) -> str | None:
    """Say why a helper ended, or return None where it had done its work."""
    if process.exitcode == 0:
        return None
    try:
        told = str(connection.recv())
    except EOFError:
        told = f"it was killed (exit code {process.exitcode})."
    return f"A worker ended early: {told} What it had not finished was done by others."


def _help(work: WorkerFunction, arguments: tuple[Any, ...], connection: Connection) -> None:
    """Do all that a helper does: work, tell what went wrong, and stop when told to or when nobody is left to tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)

    def receive() -> Any:
        message = connection.recv()
        threading.Thread(target=_watch, args=(connection,), daemon=True).start()
        return message

    try:
        work(*arguments, receive)
        code = 0
    except (Stopped, EOFError):
        code = _TERMINATED
    except (QevalError, RuntimeError, OSError, MemoryError) as error:
        connection.send(str(error) or type(error).__name__)
        code = QevalError.exit_code
    os._exit(code)  # without the interpreter's farewell, in which a signal would be an error


def _watch(connection: Connection) -> None:
    """Stop the helper when its parent is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped
