"""A process of an engine as the job sees it: requests and answers, and what is known of one that died."""

import multiprocessing
import signal
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from qeval.bench.messages import Failed, Trouble, WorkerRequest
from qeval.bench.worker import serve
from qeval.executors.processes import deaf_to_ctrl_c

_CONTEXT = multiprocessing.get_context("spawn")  # the threads of the runtimes do not live through a fork
_END_SECONDS = 10.0
_VMSTAT = Path("/proc/vmstat")

_T = TypeVar("_T")


class EngineError(Exception):
    """An engine did not do what was requested: the kind of trouble, and a sentence that says which."""

    def __init__(self, trouble: Trouble, reason: str) -> None:
        """Take the reason, which goes into the record."""
        super().__init__(reason)
        self.trouble: Trouble = trouble
        self.reason = reason


class WorkerHandle:
    """One process, from its start to its end."""

    def __init__(self, log: Path) -> None:
        """Start it; what it prints goes to `log`."""
        self._connection, worker_end = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=serve, args=(worker_end, log), daemon=True)
        self._killed_before = _oom_kills()
        with deaf_to_ctrl_c():
            self._process.start()
        worker_end.close()

    @property
    def is_alive(self) -> bool:
        """Return whether it can answer."""
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        """Return its process id."""
        return self._process.pid

    def ask(self, what: WorkerRequest, kind: type[_T], seconds: float | None = None) -> _T:
        """Return its answer.

        Args:
            what: The request.
            kind: The type of the answer.
            seconds: The longest wait.

        Raises:
            EngineError: It could not do it, it died, or there was no answer within `seconds`; after the latter two,
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
            raise EngineError(answer.trouble, answer.reason)
        assert isinstance(answer, kind), answer
        return answer

    def end(self) -> None:
        """End it; one that does not end is killed."""
        self._connection.close()
        self._process.join(_END_SECONDS)
        self._kill()

    def _answer(self, seconds: float | None) -> Any:
        if not wait([self._connection, self._process.sentinel], seconds):
            self._kill()
            raise EngineError("failed", f"It did not answer within {seconds:.0f} s and was ended.")
        return self._connection.recv()  # raises EOFError where it died without a word

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> EngineError:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        self._connection.close()
        if code == -signal.SIGKILL and _oom_kills() > self._killed_before:
            return EngineError("oom", "Out of memory: the system killed the engine's process.")
        if code is not None and code < 0:
            return EngineError("failed", f"The engine's process was ended by {_signal_name(-code)}.")
        return EngineError("failed", f"The engine's process ended early (exit code {code}).")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_kills() -> int:
    """Return how many processes Linux has killed so far because memory ran out; 0 where it doesn't say."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
