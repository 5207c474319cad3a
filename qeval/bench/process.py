"""A process of an engine as the job sees it: asked and answered, and told apart from one that has died."""

import multiprocessing
import signal
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from qeval.bench.child import serve
from qeval.bench.words import Ask, Failed, Trouble
from qeval.executors.processes import deaf_to_ctrl_c

_CONTEXT = multiprocessing.get_context("spawn")  # the threads of the runtimes do not live through a fork
_END_SECONDS = 10.0
_VMSTAT = Path("/proc/vmstat")

_T = TypeVar("_T")


class TroubleError(Exception):
    """An engine did not do what it was asked: what kind of trouble, and a sentence that says which."""

    def __init__(self, trouble: Trouble, reason: str) -> None:
        """`reason` goes into the record."""
        super().__init__(reason)
        self.trouble: Trouble = trouble
        self.reason = reason


class Child:
    """One process, from its start to its end."""

    def __init__(self, log: Path) -> None:
        """Start it; what it prints goes to `log`."""
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=serve, args=(theirs, log), daemon=True)
        self._killed_before = _oom_kills()
        with deaf_to_ctrl_c():
            self._process.start()
        theirs.close()

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        """The system's number of it."""
        return self._process.pid

    def ask(self, what: Ask, kind: type[_T], seconds: float | None = None) -> _T:
        """Its answer, of the kind expected.

        Raises:
            TroubleError: it could not do it, it died, or there was no answer within `seconds`; after the latter two,
                and where its memory ran out, the process is gone.
        """
        try:
            self._connection.send(what)
            answer = self._answer(seconds)
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, Failed):
            if answer.fatal:
                self.end()
            raise TroubleError(answer.trouble, answer.reason)
        assert isinstance(answer, kind), answer
        return answer

    def end(self) -> None:
        """Let it go; one that does not is killed."""
        self._connection.close()
        self._process.join(_END_SECONDS)
        self._kill()

    def _answer(self, seconds: float | None) -> Any:
        if not wait([self._connection, self._process.sentinel], seconds):
            self._kill()
            raise TroubleError("failed", f"It did not answer within {seconds:.0f} s and was ended.")
        return self._connection.recv()  # raises EOFError where it died without a word

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> TroubleError:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        self._connection.close()
        if code == -signal.SIGKILL and _oom_kills() > self._killed_before:
            return TroubleError("oom", "Out of memory: the system killed the engine's process.")
        if code is not None and code < 0:
            return TroubleError("failed", f"The engine's process was ended by {_signal_name(-code)}.")
        return TroubleError("failed", f"The engine's process ended early (exit code {code}).")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_kills() -> int:
    """How many processes Linux has killed so far because memory ran out; 0 where it doesn't tell."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
