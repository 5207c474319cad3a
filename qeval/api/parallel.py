"""Several comparisons at once, each in a process of its own, which reports by events how it went."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from qeval.errors import QevalError
from qeval.store.ledger import read_ledger

_WORKER = ("-P", "-m", "qeval.api.worker")
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0


@dataclass(eq=False)
class ComparisonProcess:
    """One model's comparison in a process: waiting, at work or done.

    `options` are the keywords of `compare`, as JSON holds them; `code` is the exit code, None before the end, and
    `error` says why there is no report.
    """

    name: str
    folder: Path
    options: Mapping[str, Any]
    code: int | None = None
    error: str | None = None
    seconds: float = 0.0
    model: str | None = None
    """The model as `compare` takes it; None: the name."""
    _process: "subprocess.Popen[bytes] | None" = None
    _events: IO[bytes] = field(default_factory=TemporaryFile)
    _stderr: IO[bytes] = field(default_factory=TemporaryFile)
    _began: float = 0.0

    @property
    def is_running(self) -> bool:
        """Return whether its process lives, as far as is known."""
        return self._process is not None and self.code is None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start its process."""
        self._began = time.monotonic()
        job = json.dumps({"model": self.model or self.name, "options": {**self.options, "out": str(self.folder)}})
        command = [sys.executable, *_WORKER, job]
        self._process = subprocess.Popen(command, stdout=self._events, stderr=self._stderr, env=dict(environment))

    def poll(self) -> None:
        """See whether it has ended, and how."""
        if self._process is None or self.code is not None:
            return
        self.seconds = time.monotonic() - self._began
        if (code := self._process.poll()) is None:
            return
        ends = [event for event in self._read_events() if event["event"] in ("done", "failed")]
        if not ends:
            self.error = f"it ended with exit code {code}"
        elif ends[-1]["event"] == "failed":
            self.error = str(ends[-1]["error"])
        self.code = code if self.error is None else QevalError.exit_code

    def lines(self) -> list[str]:
        """Return its warnings, why it failed, and what its libraries wrote to stderr."""
        lines = [f"warning: {event['message']}" for event in self._read_events() if event["event"] == "warning"]
        lines += [f"error: {self.error}"] if self.error else []
        self._stderr.seek(0)
        return [*lines, *self._stderr.read().decode(errors="replace").splitlines()]

    def stop(self) -> None:
        """End it: it puts its work away and says nothing more."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._events.close()
        self._stderr.close()

    def state(self) -> str:
        """Return in words how far it is."""
        if self.code is not None:
            return "done" if self.code == 0 else f"failed: {self.error or 'a variant failed'}"
        return "waiting" if self._process is None else f"at work, {self._jobs()} jobs done"

    def _read_events(self) -> list[dict[str, Any]]:
        """Return the events so far; a line that is not whole yet is left for the next time."""
        self._events.seek(0)
        events = []
        for line in self._events.read().splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events

    def _jobs(self) -> int:
        try:
            with read_ledger(self.folder) as ledger:
                return len(ledger.finished())
        except (FileNotFoundError, QevalError):
            return 0  # the ledger is about to be created, or just being changed


def run_all(
    comparisons: Sequence[ComparisonProcess], at_once: int, environment: Mapping[str, str]
) -> Iterator[ComparisonProcess]:
    """Run all comparisons and yield each as it ends; when the caller leaves early, those at work are stopped.

    Args:
        comparisons: What is to be run, in order.
        at_once: How many are at work at a time.
        environment: Of their processes.
    """
    waiting, running = list(comparisons), list[ComparisonProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start(environment)
            time.sleep(_POLL_SECONDS)
            for comparison in list(running):
                comparison.poll()
                if not comparison.is_running:
                    running.remove(comparison)
                    yield comparison
    finally:
        for comparison in comparisons:
            comparison.stop()
