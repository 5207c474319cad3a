"""Tables as a terminal lays them out, and the last one that `compare` prints: every variant in one line."""

from rich.table import Table as RichTable
from rich.text import Text

from qeval import escape
from qeval.report.document import Table, TableCell
from qeval.report.model import Report
from qeval.report.tables import overview_table


def summary_table(report: Report) -> RichTable:
    """Return the overview as a terminal lays it out; the interval stands under its number."""
    return terminal_table(overview_table(report), report.intervals.method)


def terminal_table(table: Table, caption: str | None = None) -> RichTable:
    """Return any table of the page as a terminal lays it out, numbers to the right, with a line under it."""
    terminal = RichTable(title=_plain(table.caption), caption=None if caption is None else _plain(caption))
    for place, column in enumerate(table.columns):
        right = bool(table.rows) and table.numeric(place)
        terminal.add_column(_plain(column), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        terminal.add_row(*(_text(cell) for cell in row))
    return terminal


def _text(cell: TableCell) -> Text:
    """Return plain text, so that brackets are not taken for markup."""
    text = _plain(cell.text)
    for part in (cell.interval, cell.remark):
        if part:
            text.append(f"\n{escape.visible(part)}", style="dim")
    return text


def _plain(text: str) -> Text:
    """Return text on one line, without what a terminal would obey."""
    return Text(escape.visible(text))
