"""Print plans and results: as text, never as markup, on whatever terminal or pipe there is.

Names that files and users give reach the screen through the consoles made here alone: they draw what a terminal would
obey (`escape.terminal`), take no brackets for markup, and replace what the encoding of the stream has no letter for.
"""

import codecs
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from qeval import escape

_FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""
_REPLACEMENTS = {
    "−": "-", "–": "-", "—": "-", "…": "...", "·": ".", "×": "x", "≤": "<=", "≥": ">=", "→": "->", "•": "*", "²": "^2",
    "↵": "/", "⇥": ">", "✅": "+", "❌": "x", "❔": "?", "💥": "!", "‘": "'", "’": "'", "“": '"', "”": '"', "±": "+-",
}  # fmt: skip
"""What stands for letters of ours that a terminal's encoding may lack."""
_ERRORS = "qeval-terminal"


class PlainConsole(Console):
    """A console for text that others wrote: nothing in it is markup, an emoji's name or an escape sequence."""

    def __init__(self, *, stderr: bool = False) -> None:
        """Write to stdout, or to stderr."""
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return text as rich does, without control characters."""
        return super().render_str(escape.terminal(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments as rich does; what a terminal would obey is drawn."""
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                yield Segment(escape.terminal(segment.text), segment.style)


def plan_table() -> Table:
    """Return a table of names and what they are, without rows; nothing is cut on a narrow terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def stdout(width: int = _FILE_WIDTH) -> PlainConsole:
    """Return the console of results; a file or a pipe gets at least `width` columns."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console


def stderr() -> PlainConsole:
    """Return the console of plans, progress, warnings and errors."""
    return PlainConsole(stderr=True)


def print_json(text: str) -> None:
    """Write JSON to stdout, in characters that stdout can hold and no terminal obeys."""
    sys.stdout.write(escape.json_text(text.removesuffix("\n"), sys.stdout.encoding or "utf-8") + "\n")


def print_line(text: str) -> None:
    """Write a line to stdout, for programs to read: never wrapped or coloured."""
    sys.stdout.write(escape.terminal(text) + "\n")


def accept_every_letter(*streams: TextIO) -> None:
    """Let letters that a stream's encoding lacks be replaced by others, where Python would raise an error."""
    codecs.register_error(_ERRORS, _replaced)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Return the nearest letters that any encoding has, of what could not be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(character, "?") for character in missing), error.end
