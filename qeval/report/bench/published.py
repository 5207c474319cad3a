"""Published rows as a page shows them next to its own: each marked as other hardware, with its source."""

from collections.abc import Sequence

from qeval.report.bench.reference import SAVINGS, Published, Reference
from qeval.report.bench.rows import FIGURES
from qeval.report.bench.summary import Summary
from qeval.report.document import NOTHING, TableCell

Rows = list[tuple[TableCell, ...]]


def speed_rows(summary: Summary, tables: Sequence[Reference]) -> tuple[Rows, str]:
    """Return the published rows of the measured cells, or all where none is, and a remark for the note."""
    tables = [table for table in tables if not table.savings]
    places = {row.place for row in summary.rows}
    rows: Rows = []
    remark = ""
    for table in tables:
        same = [each for each in table.rows if (each.batch, each.prompt) in places] or list(table.rows)
        rows += [_speed(each) for each in same]
        remark += _remark(table, same, f"{len(same)} of its {len(table.rows)} rows, those of these batches and prompts")
    return rows, remark


def saving_rows(tables: Sequence[Reference]) -> tuple[Rows, str]:
    """Return all published rows of savings, and a remark for the note."""
    tables = [table for table in tables if table.savings]
    return (
        [_saving(each) for table in tables for each in table.rows],
        "".join(_remark(table, table.rows, f"{len(table.rows)} rows") for table in tables),
    )


def _speed(row: Published) -> tuple[TableCell, ...]:
    figures = [TableCell("OOM")] * len(FIGURES) if row.oom else [_figure(row, name) for name in FIGURES]
    return _engine(row), _variant(row), TableCell(str(row.batch)), TableCell(str(row.prompt)), *figures


def _saving(row: Published) -> tuple[TableCell, ...]:
    cells = [TableCell(f"{row.figures[name]:.2f}×") if name in row.figures else NOTHING for name in SAVINGS]
    numbers = (TableCell(str(number)) for number in (row.batch, row.prompt, row.generated))
    return (
        TableCell(row.model, remark=_other(row)),
        TableCell(row.engine),
        TableCell(row.weights),
        TableCell(row.base or ""),
        *numbers,
        *cells,
    )


def _engine(row: Published) -> TableCell:
    return TableCell(row.engine, remark=_other(row))


def _variant(row: Published) -> TableCell:
    return TableCell(f"{row.model}, {row.weights}")


def _other(row: Published) -> str:
    return f"published, other hardware: {row.hardware}"


def _figure(row: Published, name: str) -> TableCell:
    """Return four digits of what was published: it has no interval that would support more."""
    return TableCell(f"{row.figures[name]:.4g}" if row.figures[name] < 1e4 else f"{row.figures[name]:.0f}")


def _remark(table: Reference, shown: Sequence[Published], how_many: str) -> str:
    """Return the table's sources, and what is to be known of single rows, each said once."""
    sources = ", ".join(dict.fromkeys(row.source for row in shown))
    remarks = dict.fromkeys(f"{row.model} {row.engine} {row.weights}: {row.remark}" for row in shown if row.remark)
    remark = f" Remarks: {'; '.join(remarks)}." if remarks else ""
    return f" Published ({table.name}; {how_many}), measured by others on other hardware: {sources}.{remark}"
