"""Progress bars with an ETA on a terminal; a line a phase elsewhere; nothing when quiet."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qeval import escape
from qeval.progress import Advance


class ConsoleProgress:
    """Phases as bars on stderr, so that stdout stays clean for results."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        """Draw bars on a terminal only; `quiet` drops everything but warnings."""
        self._console, self._quiet = console, quiet
        self.warnings: list[str] = []

    @contextmanager
    def phase(self, label: str, units: int) -> Iterator[Advance]:
        """Show a bar for the length of the block; the block calls what it gets with the units that are done."""
        if self._quiet or not self._console.is_terminal:
            yield lambda done: None
            return
        columns = (
            TextColumn("{task.description:<32}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as bars:
            task = bars.add_task(label, total=max(units, 1))
            yield lambda done: bars.advance(task, done)
            bars.update(task, completed=max(units, 1))

    def warn(self, message: str) -> None:
        """Show a warning at once and keep it for the report."""
        self.warnings.append(message)
        self._console.print(Text.assemble(("warning:", "yellow"), " ", escape.terminal(message)), soft_wrap=True)

    def tell(self, message: str) -> None:
        """Print a message, unless quiet."""
        if not self._quiet:
            self._console.print(message, soft_wrap=True)
