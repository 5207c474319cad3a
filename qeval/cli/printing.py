"""How plans and results are printed: on stdout as wide as a table needs where the medium has no width of its own."""

from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


def plan_table() -> Table:
    """Names and what they are, to be filled row by row; what a narrow terminal can't hold in a line is never cut."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def stdout(width: int = _FILE_WIDTH) -> Console:
    """The console of results; a file or a pipe gets at least `width` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console
