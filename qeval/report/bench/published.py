"""Published rows as a page lays them beside its own: each marked as other hardware, with its source."""

from collections.abc import Sequence

from qeval.report.bench.reference import SAVINGS, Published, Reference
from qeval.report.bench.rows import FIGURES
from qeval.report.bench.summary import Summary
from qeval.report.page import NOTHING, Cell

Rows = list[tuple[Cell, ...]]


def speed_rows(found: Summary, tables: Sequence[Reference]) -> tuple[Rows, str]:
    """The published rows of the cells that were asked for here, or all where none is, and a remark for the note."""
    tables = [table for table in tables if not table.savings]
    places = {row.place for row in found.rows}
    rows: Rows = []
    told = ""
    for table in tables:
        same = [each for each in table.rows if (each.batch, each.prompt) in places] or list(table.rows)
        rows += [_speed(each) for each in same]
        told += _told(table, same, f"{len(same)} of its {len(table.rows)} rows, those of these batches and prompts")
    return rows, told


def saving_rows(tables: Sequence[Reference]) -> tuple[Rows, str]:
    """All published rows of savings, and a remark for the note."""
    tables = [table for table in tables if table.savings]
    return (
        [_saving(each) for table in tables for each in table.rows],
        "".join(_told(table, table.rows, f"{len(table.rows)} rows") for table in tables),
    )


def _speed(row: Published) -> tuple[Cell, ...]:
    figures = [Cell("OOM")] * len(FIGURES) if row.oom else [_figure(row, name) for name in FIGURES]
    return _engine(row), _variant(row), Cell(str(row.batch)), Cell(str(row.prompt)), *figures


def _saving(row: Published) -> tuple[Cell, ...]:
    cells = [Cell(f"{row.figures[name]:.2f}×") if name in row.figures else NOTHING for name in SAVINGS]
    numbers = (Cell(str(number)) for number in (row.batch, row.prompt, row.generated))
    return (
        Cell(row.model, remark=_other(row)),
        Cell(row.engine),
        Cell(row.weights),
        Cell(row.base or ""),
        *numbers,
        *cells,
    )


def _engine(row: Published) -> Cell:
    return Cell(row.engine, remark=_other(row))


def _variant(row: Published) -> Cell:
    return Cell(f"{row.model}, {row.weights}")


def _other(row: Published) -> str:
    return f"published, other hardware: {row.hardware}"


def _figure(row: Published, name: str) -> Cell:
    """Four digits of what was published: it has no interval that would support more."""
    return Cell(f"{row.figures[name]:.4g}" if row.figures[name] < 1e4 else f"{row.figures[name]:.0f}")


def _told(table: Reference, shown: Sequence[Published], how_many: str) -> str:
    """The table's sources, and what is to be known of single rows, each said once."""
    sources = ", ".join(dict.fromkeys(row.source for row in shown))
    remarks = dict.fromkeys(f"{row.model} {row.engine} {row.weights}: {row.remark}" for row in shown if row.remark)
    told = f" Remarks: {'; '.join(remarks)}." if remarks else ""
    return f" Published ({table.name}; {how_many}), measured by others on other hardware: {sources}.{told}"
