"""lm-evaluation-harness: `samples_TASK_DATE.jsonl`, as `--log_samples` writes them; every output type.

A line is one item under one filter. Multiple choice keeps the log-likelihoods of its choices, so that all that qeval
measures of its own answers is measured of these; other types keep each metric's value, and perplexities each item's
negative log-likelihood a word or byte. Metrics that exist for a whole corpus alone (BLEU, F1 of classes) have no row.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qeval.errors import UsageError
from qeval.imports.foreign_rows import ONLY_REPEAT, Declarations, ForeignChoices, ForeignRows
from qeval.imports.sample_columns import Samples, read_samples
from qeval.stats.bootstrap import Floats, Ints
from qeval.tasks.directions import NATS, Direction, direction_of

_NAME = re.compile(r"samples_(?P<task>.+?)(?:_(?P<date>\d{4}-\d{2}-\d{2}T[\d.:-]+))?\.jsonl")
_FORMAT = "lm-eval"


class _Harness(NamedTuple):
    """The record of a run's tasks, which lies beside the samples."""

    higher_is_better: Mapping[str, Mapping[str, bool | None]]
    parents: Mapping[str, str]  # of each task of a group the group


def is_samples(path: Path) -> bool:
    """Return whether a file's name is that of the harness's samples."""
    return _NAME.fullmatch(path.name) is not None


def read_lm_eval(path: Path, model: str, declarations: Declarations) -> list[ForeignRows]:
    """Return the rows of a file of samples, one part a metric and filter.

    Args:
        path: The file, `samples_TASK_DATE.jsonl`.
        model: The model that it is of.
        declarations: What the user says of it.

    Raises:
        UsageError: It is no such file, a line is torn, or no metric has a value for each item.
    """
    match = _NAME.fullmatch(path.name)
    leaf, date = (match["task"], match["date"]) if match else (path.stem, None)
    harness = _harness(path.with_name(f"results_{date}.json"))
    task = declarations.task or _top(leaf, harness.parents)
    subject = leaf.removeprefix(f"{task}_")

    parts, skipped = [], []
    for samples in read_samples(path):
        for metric in samples.metrics:
            if metric == "acc_norm" and samples.loglikelihoods is not None and "acc" in samples.metrics:
                continue  # it stands beside acc
            scores = _scores(samples, metric)
            if scores is None:
                skipped.append(metric)
                continue
            says = harness.higher_is_better.get(leaf, {}).get(metric)
            file_says: Direction | None = None if says is None or metric in NATS else "higher" if says else "lower"
            better = direction_of(metric, file_says, declarations.better, path.name)
            parts.append(
                ForeignRows(
                    model=model, file=path, format=_FORMAT, task=task, metric=metric, filter=samples.filter,
                    better=better, unit="nats" if metric in NATS else None,
                    subjects=_repeated(subject, len(samples.items)), items=samples.items,
                    repeats=_repeated(ONLY_REPEAT, len(samples.items)), scores=scores, hashes=samples.hashes,
                    choices=_choices(samples, scores) if metric == "acc" else None,
                )
            )  # fmt: skip
    if not parts:
        raise UsageError(
            f"{path} has no metric with a value for each item ({', '.join(skipped) or 'none at all'}), so nothing "
            "in it can be paired."
        )
    return [replace(part, notes=(*part.notes, *_skipped_notes(task, skipped))) for part in parts]


def _skipped_notes(task: str, metrics: Sequence[str]) -> list[str]:
    """Return a sentence on metrics of a task that were left out beside others; none where all were taken."""
    if not metrics:
        return []
    names = ", ".join(dict.fromkeys(metrics))
    return [
        f"{task}: {names} left out, since lm-eval has no value of it for each item (a figure of the whole corpus, or "
        "one kept in another form); no rule can rest on it."
    ]


def _scores(samples: Samples, metric: str) -> Floats | None:
    """Return a metric's value of each item, NaN where it has none; None where it is one of the whole corpus alone."""
    values = samples.values[metric]
    if metric not in NATS:
        plain = [v for v in values if v is not None]
        if not plain or not all(isinstance(v, bool | int | float) for v in plain):
            return None
        return np.asarray([np.nan if v is None else float(v) for v in values], np.float64)

    # log-likelihoods, with the length that they are of, or alone; a mean over items is then one over all words
    pairs = [v if isinstance(v, list) and len(v) == 2 else [v, 1] for v in values]
    loglikelihoods, lengths = (np.asarray([pair[i] for pair in pairs], np.float64) for i in (0, 1))
    return np.asarray(-loglikelihoods / lengths.mean(), np.float64)


def _choices(samples: Samples, acc: Floats) -> ForeignChoices | None:
    """Return the answers where log-likelihoods are kept and the right choices can be read; else None."""
    if samples.loglikelihoods is None or samples.counts is None:
        return None
    starts = np.concatenate([[0], np.cumsum(samples.counts)[:-1]]).astype(np.int64)
    pred = _first_largest(samples.loglikelihoods, samples.counts, starts)
    for read in (_indices, _matches):  # the second reads the file once more
        gold = read(samples)
        if gold is not None and ((gold >= 0) & (gold < samples.counts)).all() and ((pred == gold) == (acc == 1)).all():
            norm = _scores(samples, "acc_norm") if "acc_norm" in samples.metrics else None
            return ForeignChoices(gold, pred, samples.loglikelihoods, samples.counts, norm)
    return None


def _first_largest(values: Floats, counts: Ints, starts: Ints) -> Ints:
    """Return the place of each item's largest value, the first of equals; -1 where one is NaN."""
    largest = np.repeat(np.maximum.reduceat(values, starts), counts)
    places = np.arange(len(values)) - np.repeat(starts, counts)
    never = int(counts.max())
    first = np.minimum.reduceat(np.where(values == largest, places, never), starts)
    return np.where(first == never, -1, first).astype(np.int64)


def _indices(samples: Samples) -> Ints | None:
    """Return the targets as places of choices; None where they are no numbers."""
    if not all(target.isdecimal() for target in samples.targets):
        return None
    return np.asarray([int(target) for target in samples.targets], np.int64)


def _matches(samples: Samples) -> Ints | None:
    """Return the places of the targets among the continuations; None where the samples do not hold those."""
    continuations = samples.continuations()
    if continuations is None:
        return None
    stripped = [[text.strip() for text in texts] for texts in continuations]
    return np.asarray(
        [
            texts.index(target.strip()) if target.strip() in texts else -1
            for texts, target in zip(stripped, samples.targets, strict=True)
        ],
        np.int64,
    )


@cache
def _harness(path: Path) -> _Harness:
    """Return what the record of the same run says; nothing where it isn't there."""
    if not path.is_file():
        return _Harness({}, {})
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        groups: Mapping[str, Iterable[str]] = data.get("group_subtasks") or {}
        parents = {child: group for group, children in groups.items() for child in children}
        return _Harness(data.get("higher_is_better") or {}, parents)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} is no record of lm-eval's results ({error}); move it away or mend it.") from error


def _top(task: str, parents: Mapping[str, str]) -> str:
    """Return the outermost group of a task, or the task itself."""
    seen = {task}
    while (parent := parents.get(task)) and parent not in seen:
        seen.add(parent)
        task = parent
    return task


def _repeated(text: str, rows: int) -> Any:
    return np.full(rows, text, np.object_)
