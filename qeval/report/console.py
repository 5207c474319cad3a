"""Tables as a terminal lays them out, and the last one that `compare` prints: every variant in one line."""

from rich.table import Table as RichTable
from rich.text import Text

from qeval.report.model import Report
from qeval.report.page import Cell, Table
from qeval.report.tables import overview


def summary_table(report: Report) -> RichTable:
    """The overview as a terminal lays it out; the interval stands under its number."""
    return terminal_table(overview(report), report.intervals.method)


def terminal_table(table: Table, caption: str | None = None) -> RichTable:
    """Any table of the page as a terminal lays it out, numbers to the right, with a line under it."""
    made = RichTable(title=Text(table.caption), caption=None if caption is None else Text(caption))
    for place, column in enumerate(table.columns):
        right = bool(table.rows) and table.numeric(place)
        made.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*(_text(cell) for cell in row))
    return made


def _text(cell: Cell) -> Text:
    """Plain text, so that brackets are not taken for markup."""
    made = Text(cell.text)
    for part in (cell.interval, cell.remark):
        if part:
            made.append(f"\n{part}", style="dim")
    return made
