"""The last thing that `compare` prints: every variant in one line."""

from rich.table import Table as RichTable
from rich.text import Text

from qeval.report.model import Report
from qeval.report.page import Cell
from qeval.report.tables import overview


def summary_table(report: Report) -> RichTable:
    """The overview as a terminal lays it out; the interval stands under its number."""
    table = overview(report)
    made = RichTable(title=table.caption, caption=report.intervals.method)
    for place, column in enumerate(table.columns):
        made.add_column(Text(column), justify="left" if place == 0 else "right")
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
