"""`import_files`: rows that other programs measured become a run, which gate, diff and card read as any other."""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from qeval.errors import UsageError, unknown
from qeval.imports.check_sides import ModelScores, check_pair
from qeval.imports.foreign_rows import Declarations, ForeignRows, SourceFile
from qeval.imports.inspect_logs import is_inspect_log, read_inspect
from qeval.imports.lm_eval_samples import is_samples, read_lm_eval
from qeval.imports.score_tables import SUFFIXES, read_table
from qeval.imports.write_run import write_imported
from qeval.report.align import BASELINE_NAME
from qeval.store.out import check_out
from qeval.store.run import RunRecord

_THREADS = 2
_NAME = re.compile(r"[^\s/\\=]+")


def import_files(
    sources: Sequence[SourceFile],
    out: Path,
    declarations: Declarations,
    *,
    baseline: str | None = None,
    repeats: bool = False,
    command: str = "qeval import",
) -> RunRecord:
    """Write a run of foreign rows and return its record.

    Args:
        sources: Files, or folders of lm-eval's samples, with the models they are of.
        out: The run's folder.
        declarations: What the user says of the files.
        baseline: The model that others are compared with; None: the one called baseline, else the first.
        repeats: Whether several files of one task and model are repeats of it.
        command: What made the run.

    Raises:
        UsageError: A file can't be read, or its rows can't be paired: it says which and why.
        QevalError: The run can't be written.
    """
    started = datetime.now(UTC)
    check_out(out, "the run")
    with ThreadPoolExecutor(_THREADS) as threads:
        parts = [
            part for own in threads.map(lambda source: _read(source, declarations), _expanded(sources)) for part in own
        ]
    if repeats:
        parts = _numbered(parts)
    sides = _sides(parts, _baseline(parts, baseline))
    return write_imported(out, sides, started, command)


def _expanded(sources: Sequence[SourceFile]) -> Iterator[SourceFile]:
    """Yield the files, those of folders among them."""
    for source in sources:
        if not source.path.exists():
            raise UsageError(f"There is no '{source.path}' to import.")
        if not source.path.is_dir():
            yield source
            continue
        files = [path for path in sorted(source.path.iterdir()) if is_samples(path)]
        if not files:
            raise UsageError(f"'{source.path}' holds no samples_TASK_DATE.jsonl of lm-eval's; name the file.")
        yield from (SourceFile(path, source.model or source.path.resolve().name) for path in files)


def _read(source: SourceFile, declarations: Declarations) -> list[ForeignRows]:
    """Return a file's rows, by the reader of its kind."""
    path = source.path
    if is_samples(path):
        return read_lm_eval(path, source.model or path.resolve().parent.name, declarations)
    if is_inspect_log(path):
        return read_inspect(path, source.model, declarations)
    if path.suffix in SUFFIXES:
        return read_table(path, source.model, declarations)
    raise UsageError(
        f"'{path}' is none of the files that can be imported: lm-eval's samples_TASK_DATE.jsonl, Inspect's .eval or "
        ".json log, or a table as .csv, .jsonl or .parquet."
    )


def _numbered(parts: Sequence[ForeignRows]) -> list[ForeignRows]:
    """Return the parts with each file of one score and model as a repeat of its own."""
    counts: dict[tuple[str, str, str], int] = {}
    numbered = []
    for part in parts:
        key = part.model, part.name, str(part.subjects[0])
        number = counts[key] = counts.get(key, -1) + 1
        labels = [f"{number}.{label}" for label in part.repeats]
        # repeated answers are scores: their choices belong to one draw each
        numbered.append(replace(part, repeats=np.asarray(labels, np.object_), choices=None))
    return numbered


def _baseline(parts: Sequence[ForeignRows], name: str | None) -> str:
    models = list(dict.fromkeys(part.model for part in parts))
    for model in models:
        if not _NAME.fullmatch(model):
            raise UsageError(f"'{model}' can't name a model here (no spaces, slashes or '='); give one as NAME=FILE.")
    if name is not None and name not in models:
        raise unknown("model of the files", name, models)
    if len(models) < 2:
        raise UsageError(
            f"All files are of one model, '{models[0]}'; give a baseline and at least one other, such as "
            "baseline=FILE awq=FILE."
        )
    chosen = name or (BASELINE_NAME if BASELINE_NAME in models else models[0])
    if chosen != BASELINE_NAME and BASELINE_NAME in models:
        raise UsageError(f"A variant can't be called '{BASELINE_NAME}'; name it otherwise, as NAME=FILE.")
    return chosen


def _sides(parts: Sequence[ForeignRows], baseline: str) -> Mapping[str, Sequence[ModelScores]]:
    """Return the sides of each score, the baseline's first, all of them checked."""
    models = [baseline, *(name for name in dict.fromkeys(part.model for part in parts) if name != baseline)]
    sides: dict[str, list[ModelScores]] = {}
    for score in dict.fromkeys(part.name for part in parts):
        by_model = {model: [part for part in parts if (part.model, part.name) == (model, score)] for model in models}
        if lacking := [model for model, own in by_model.items() if not own]:
            raise UsageError(f"'{lacking[0]}' has no rows of '{score}', which others have; every model needs the same.")
        sides[score] = [ModelScores(_alike(own)) for own in _one_form(list(by_model.values()))]
        for other in sides[score][1:]:
            check_pair(sides[score][0], other)
    return sides


def _one_form(models: Sequence[Sequence[ForeignRows]]) -> list[list[ForeignRows]]:
    """Return the parts of all models as answers with choices, or as scores alone where one has none."""
    if all(part.choices is not None for parts in models for part in parts):
        return [list(parts) for parts in models]
    return [[replace(part, choices=None) for part in parts] for parts in models]


def _alike(parts: Sequence[ForeignRows]) -> Sequence[ForeignRows]:
    """Refuse parts of one score that are better in different directions."""
    if len({part.better for part in parts}) > 1:
        files = " and ".join(part.file.name for part in parts[:2])
        raise UsageError(f"{files} say differently whether more of '{parts[0].name}' is better.")
    return parts
