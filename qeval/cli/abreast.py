"""Several comparisons at once, each in a process of its own, with one line a model while they run."""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qeval.errors import QevalError
from qeval.store.ledger import read_ledger

_PROGRAM = ("-P", "-c", "from qeval.cli.app import main; main()", "compare")
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0


class Result(NamedTuple):
    """How a comparison ended: its exit code, and why there is no report, or None."""

    code: int
    error: str | None


@dataclass(eq=False)
class Comparison:
    """One model's `qeval compare`: waiting, at work or done."""

    name: str
    arguments: Sequence[str]
    folder: Path
    result: Result | None = None
    seconds: float = 0.0
    _process: "subprocess.Popen[bytes] | None" = None
    _told: IO[bytes] = field(default_factory=TemporaryFile)
    _began: float = 0.0

    @property
    def is_running(self) -> bool:
        """Whether its process lives, as far as is known."""
        return self._process is not None and self.result is None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start its process."""
        self._began = time.monotonic()
        command = [sys.executable, *_PROGRAM, *self.arguments, "--quiet"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._told, env=dict(environment))

    def look(self) -> None:
        """See whether it has ended."""
        if self._process is None or self.result is not None:
            return
        self.seconds = time.monotonic() - self._began
        if (code := self._process.poll()) is not None:
            error = self._error(code)
            self.result = Result(code if error is None else QevalError.exit_code, error)

    def told(self) -> list[str]:
        """The lines that it wrote to stderr."""
        self._told.seek(0)
        return self._told.read().decode(errors="replace").splitlines()

    def stop(self) -> None:
        """End it: it puts its work away and says nothing more."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._told.close()

    def state(self) -> str:
        """What a person is told of it."""
        if self.result is not None:
            return "done" if self.result == (0, None) else f"failed: {self.result.error or 'a variant failed'}"
        return "waiting" if self._process is None else f"at work, {self._jobs()} jobs done"

    def _error(self, code: int) -> str | None:
        """What it said was wrong; a variant that failed is in its report."""
        errors = [line.removeprefix("error: ") for line in self.told() if line.startswith("error: ")]
        if errors:
            return errors[-1]
        return None if code in (0, QevalError.exit_code) else f"it ended with exit code {code}"

    def _jobs(self) -> int:
        try:
            with read_ledger(self.folder) as ledger:
                return len(ledger.finished())
        except (FileNotFoundError, QevalError):
            return 0  # it is about to be made, or just being changed


def run_abreast(
    comparisons: Sequence[Comparison], at_once: int, environment: Mapping[str, str], console: Console, *, quiet: bool
) -> list[Result]:
    """Run all of them, `at_once` at a time, and tell of each as it begins and ends; what they warned of is told too."""
    try:
        with _view(comparisons, console, quiet=quiet):
            for comparison in _ended(comparisons, at_once, environment):
                for line in comparison.told():
                    console.print(f"{comparison.name}: {line}", highlight=False, markup=False, soft_wrap=True)
                if not quiet:
                    state = f"{comparison.name}: {comparison.state()} after {comparison.seconds:.0f} s"
                    console.print(state, highlight=False, markup=False, soft_wrap=True)
    finally:
        for comparison in comparisons:
            comparison.stop()
    return [comparison.result for comparison in comparisons if comparison.result is not None]


def _ended(comparisons: Sequence[Comparison], at_once: int, environment: Mapping[str, str]) -> Iterator[Comparison]:
    """Each comparison as it ends, `at_once` of them being at work until none is left."""
    waiting, running = list(comparisons), list[Comparison]()
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].start(environment)
        time.sleep(_POLL_SECONDS)
        for comparison in list(running):
            comparison.look()
            if not comparison.is_running:
                running.remove(comparison)
                yield comparison


@contextmanager
def _view(comparisons: Sequence[Comparison], console: Console, *, quiet: bool) -> Iterator[None]:
    """On a terminal, a table of one line a model."""

    def table() -> Table:
        rows = Table.grid(padding=(0, 2))
        for each in comparisons:
            rows.add_row(each.name, f"{each.seconds:.0f} s" if each.seconds else "", each.state())
        return rows

    shown = console.is_terminal and not quiet
    with Live(get_renderable=table, console=console, refresh_per_second=2) if shown else nullcontext():
        yield
