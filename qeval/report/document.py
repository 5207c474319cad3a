"""The nouns of a page: what the markdown and the HTML template, and the terminal, lay out each in its way."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from qeval.report import formatting
from qeval.report.model import Metric

_NUMERIC = re.compile(r"[\d+−–]|OOM$")  # a digit, a sign, the dash of an absent number, or what it ran out of


class TableCell(NamedTuple):
    """One cell: its text, the interval of its number, and a remark in words such as `at chance`."""

    text: str
    interval: str | None = None
    remark: str | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. `folded` tables open on demand where the medium can.

    A `live` table can be sorted and searched where the medium can; `filters` are the columns of few values that
    rows are picked by.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    note: str | None = None
    folded: bool = False
    live: bool = False
    filters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse rows that do not fit the columns."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"Table '{self.caption}': {len(row)} cells in {len(self.columns)} columns.")

    def numeric(self, column: int) -> bool:
        """Return whether a column holds numbers alone, so that it is set to the right."""
        return self._numeric[column]

    @cached_property
    def _numeric(self) -> tuple[bool, ...]:
        """By column; found once, since a page asks for every cell."""
        return tuple(
            place > 0 and all(_NUMERIC.match(row[place].text) for row in self.rows)
            for place in range(len(self.columns))
        )


@dataclass(frozen=True)
class Plot:
    """A figure as files: `name` is the file's stem, `alt` says in words what it shows."""

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of the page: sentences, plots, tables, warnings, and notes that are folded where the medium can."""

    id: str
    title: str
    sentences: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Heading(NamedTuple):
    """The part above the sections: the title, a sentence that no reader may miss, and facts in a line."""

    title: str
    facts: tuple[str, ...] = ()
    banner: str | None = None


NOTHING = TableCell(formatting.MISSING)


def metric_cell(metric: Metric | None, *, signed: bool = False, remark: str | None = None) -> TableCell:
    """Return a cell with a metric, with its interval; a dash where it is absent."""
    if metric is None:
        return NOTHING
    text = formatting.value_text(metric, signed=signed)
    return TableCell(text, formatting.interval_text(metric, signed=signed), remark)
