"""Tables of scores: CSV, JSON lines or Parquet with columns item and score, and perhaps seed, subject, model, task."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from qeval.errors import UsageError
from qeval.imports.foreign_rows import HASHES, ONLY_REPEAT, Declarations, ForeignRows, TextArray
from qeval.parsing import error_reason
from qeval.stats.bootstrap import Floats
from qeval.store.schema import READ_ERRORS
from qeval.tasks.directions import direction_of

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_NEEDED = ("item", "score")
_REPEATS = ("seed", "repeat", "epoch")
_COLUMNS = (*_NEEDED, *_REPEATS, "subject", "model", "task", "metric", *HASHES)
_METRIC = "score"


def read_table(path: Path, model: str | None, declarations: Declarations) -> list[ForeignRows]:
    """Return the rows of a table, one part a model, task and metric.

    Args:
        path: The file; its suffix says its form.
        model: The model that it is of, where no column says so; None: the file's own name.
        declarations: What the user says of it.

    Raises:
        UsageError: It can't be read, lacks a column, a score is no number, or the direction isn't known.
    """
    columns = _texts(path)
    for name in _NEEDED:
        if name not in columns:
            raise UsageError(f"{path} has no column '{name}'; a table needs the columns item and score.")
    rows = len(columns["item"])
    if not rows:
        raise UsageError(f"{path} holds no row.")
    if model is not None and "model" in columns:
        raise UsageError(f"{path} has a column 'model', so it can't be given the name '{model}' too.")

    scores = _numbers(columns["score"], path)
    repeat = next((name for name in _REPEATS if name in columns), None)
    models = columns.get("model", _constant(model or path.stem, rows))
    tasks = columns.get("task", _constant(path.stem if "model" in columns else "scores", rows))
    metrics = columns.get("metric", _constant(_METRIC, rows))
    other = sorted(columns.keys() - set(_COLUMNS))

    parts = []
    for name, task, metric in dict.fromkeys(zip(models, tasks, metrics, strict=True)):
        chosen = (models == name) & (tasks == task) & (metrics == metric)
        label = declarations.task or task
        parts.append(
            ForeignRows(
                model=name, file=path, format=SUFFIXES[path.suffix], task=label, metric=metric, filter=None,
                better=direction_of(metric, None, declarations.better, path.name), unit=None,
                subjects=columns.get("subject", _constant(task, rows))[chosen], items=columns["item"][chosen],
                repeats=(columns[repeat] if repeat else _constant(ONLY_REPEAT, rows))[chosen],
                scores=scores[chosen],
                hashes={each: columns[each][chosen] for each in HASHES if each in columns},
                notes=(f"Not read, of {path.name}: {', '.join(other)}.",) if other else (),
            )
        )  # fmt: skip
    return parts


def _texts(path: Path) -> dict[str, TextArray]:
    """Return the columns of a table as text, so that an item called 007 stays that; empty cells are empty text."""
    try:
        if path.suffix == ".jsonl":
            return _of_lines(path)
        if path.suffix == ".csv":
            with pcsv.open_csv(path) as reader:
                names = reader.schema.names
            types = pcsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            table = pcsv.read_csv(path, convert_options=types)
        else:
            table = pq.ParquetFile(path).read()
    except READ_ERRORS as error:
        raise UsageError(f"{path} can't be read as {path.suffix[1:].upper()} ({error_reason(error)}).") from error
    names = table.column_names
    if len(set(names)) < len(names):
        raise UsageError(f"{path} has two columns called '{max(names, key=names.count)}'.")
    return {name: _text_column(table[name].to_pylist()) for name in names}


def _of_lines(path: Path) -> dict[str, TextArray]:
    rows: list[Mapping[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text) if text.strip() else {}
        except ValueError as error:
            raise UsageError(f"{path}, line {number}, is torn: {error}.") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}, is no object with item and score.")
        rows += [row] if row else []
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _text_column([row.get(name) for row in rows]) for name in names}


def _text_column(values: Sequence[Any]) -> TextArray:
    return np.asarray([_text(value) for value in values], np.object_)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def _numbers(texts: TextArray, path: Path) -> Floats:
    """Return the scores, NaN where a cell is empty: that item was not scored, which is counted later."""
    numbers = np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        try:
            numbers[row] = float(text) if text else np.nan
        except ValueError as error:
            raise UsageError(f"{path}, row {row + 1}: the score '{text}' is no number.") from error
    return numbers


def _constant(text: str, rows: int) -> TextArray:
    return np.full(rows, text, np.object_)
