"""Published tables to compare with: `reports/reference/*.csv`, facts with source and hardware.

Two kinds, told by their columns: speeds as in ONNX Runtime's LLaMA-2 table, savings as in Model Optimizer's. Nothing in
them was measured here, so a page marks every such row as other hardware.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qeval.errors import BrokenRecordError, unknown
from qeval.paths import shipped
from qeval.report.bench.rows import FIGURES

_SHARED = ("model", "engine", "weights")
_CELL = ("batch", "prompt", "generated")
_SOURCE = ("hardware", "source", "remark")
SAVINGS = ("memory_saving", "speedup")
_COLUMNS = {
    (*_SHARED, *_CELL, *FIGURES, *_SOURCE): tuple(FIGURES),
    (*_SHARED, "base", *_CELL, *SAVINGS, *_SOURCE): SAVINGS,
}
"""A file's columns, in order, and those of them that hold its figures."""

_OOM = "OOM"


@dataclass(frozen=True)
class Published:
    """One row as published; `figures` is empty where the publisher ran out of memory (`oom`)."""

    model: str
    engine: str
    weights: str
    base: str | None
    batch: int
    prompt: int
    generated: int
    figures: Mapping[str, float]
    oom: bool
    hardware: str
    source: str
    remark: str


@dataclass(frozen=True)
class Reference:
    """A published table; `savings` says of which kind it is."""

    name: str
    savings: bool
    rows: Sequence[Published]


def references() -> Mapping[str, Path]:
    """Return the published tables that are shipped, by name."""
    shipped_tables = sorted(shipped("reports/reference").glob("*.csv"))
    return MappingProxyType({path.stem: path for path in shipped_tables})


def read_references(names: Sequence[str]) -> list[Reference]:
    """Read tables by name, in the order asked for.

    Raises:
        UsageError: there is none of that name. BrokenRecordError: a table has other columns, or a cell that can't be.
    """
    known = references()
    for name in names:
        if name not in known:
            raise unknown("reference", name, known)
    return [read_reference(known[name]) for name in names]


def read_reference(path: Path) -> Reference:
    """Read one table.

    Raises:
        BrokenRecordError: it has other columns, or a cell that can't be; the sentence names the line.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    columns = tuple(lines[0]) if lines else ()
    if columns not in _COLUMNS:
        raise BrokenRecordError(f"{path} has other columns than a published table: {', '.join(columns) or 'none'}.")
    rows = [_published(path, at, columns, line) for at, line in enumerate(lines[1:], start=2)]
    return Reference(path.stem, _COLUMNS[columns] == SAVINGS, rows)


def _published(path: Path, at: int, columns: Sequence[str], line: Sequence[str]) -> Published:
    if len(line) != len(columns):
        raise BrokenRecordError(f"{path}, line {at}: {len(line)} cells in {len(columns)} columns.")
    cells = dict(zip(columns, line, strict=True))
    names = _COLUMNS[tuple(columns)]
    oom = all(cells[name] == _OOM for name in names)
    try:
        figures = {} if oom else {name: _positive(cells[name]) for name in names if cells[name]}
        batch, prompt, generated = (int(cells[name]) for name in _CELL)
    except ValueError as error:
        raise BrokenRecordError(f"{path}, line {at}: {error}.") from error
    missing = [name for name in (*_SHARED, "hardware", "source") if not cells[name]]
    if missing or not (oom or figures):
        raise BrokenRecordError(f"{path}, line {at} lacks {', '.join(missing) or 'figures'}.")
    texts = {name: cells[name] for name in (*_SHARED, *_SOURCE)}
    return Published(
        **texts, base=cells.get("base"), batch=batch, prompt=prompt, generated=generated, figures=figures, oom=oom
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is no figure")
    return value
