"""Where results are printed: stdout, as wide as a table needs where the medium has no width of its own."""

from rich.console import Console

_FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


def stdout(width: int = _FILE_WIDTH) -> Console:
    """The console of results; a file or a pipe gets at least `width` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console
