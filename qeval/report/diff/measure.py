"""Paired differences of two variants: B minus A on every row, with intervals clustered as in the report."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from qeval.errors import BrokenRecordError
from qeval.report import measure_items
from qeval.report.align import ItemRows, TokenRows
from qeval.report.diff.check import finite_items, finite_tokens
from qeval.report.diff.model import AnswerChanges, Difference, Verdict
from qeval.report.independent import question_clusters
from qeval.report.model import Metric
from qeval.report.run_rows import PairedRun
from qeval.stats.bootstrap import LEVEL, Clusters, Floats
from qeval.stats.closed import Mean, clustered_mean
from qeval.stats.repeats import difference_of
from qeval.store.run import ScoreRecord, TaskRecord, VariantRecord
from qeval.types import Better, Estimate

_TOKENS: dict[str, tuple[str, str, Better]] = {
    "kl_nats": ("KL from the baseline", "nats", "lower"),
    "nll": ("NLL", "nats", "lower"),
    "top1_agreement": ("same top token as the baseline", "fraction", "higher"),
}


class DiffSide(NamedTuple):
    """One run and one of its variants."""

    run: PairedRun
    variant: VariantRecord


def token_differences(a: DiffSide, b: DiffSide, columns: Sequence[str]) -> list[Difference]:
    """Return the differences of `columns` of token rows that both sides have."""
    mine, other = a.run.tokens(a.variant), b.run.tokens(b.variant)
    floors = _token_floors((a.run, b.run), columns)
    differences = []
    for column in columns:
        for rows, side in ((mine, a), (other, b)):
            finite_tokens(rows, column, side.variant.name)
        pair = mine.of(column), other.of(column)
        differences.append(_difference(column, _TOKENS[column], pair, mine.clusters(column), floors.get(column)))
    return differences


def item_differences(
    a: DiffSide, b: DiffSide, tasks: tuple[TaskRecord, TaskRecord]
) -> tuple[list[Difference], AnswerChanges]:
    """Return the differences in accuracy and in KL over the choices of one task, and what became of the answers."""
    task, name = tasks[0], tasks[0].name
    mine, other = _items(a, tasks[0]), _items(b, tasks[1])
    clusters = question_clusters(mine.subjects, mine.prompts)
    floor = _item_floors(((a.run, tasks[0]), (b.run, tasks[1])))
    kl = [
        measure_items.choice_kl_nats(rows, side.run.baseline_items(each))
        for rows, side, each in ((mine, a, tasks[0]), (other, b, tasks[1]))
    ]
    differences = [
        _difference(
            f"{name}_acc", (f"accuracy, {task.title}", "fraction", "higher"), (mine.acc, other.acc), clusters,
            floor.get("acc"),
        ),
        _difference(
            f"{name}_choice_kl_nats", (f"KL over the choices, {task.title}", "nats", "lower"), (kl[0], kl[1]),
            clusters, floor.get("choice_kl_nats"),
        ),
    ]  # fmt: skip
    return differences, _answers(a.run, task, mine, other)


def score_difference(a: DiffSide, b: DiffSide, scores: tuple[ScoreRecord, ScoreRecord]) -> Difference:
    """Return the difference of one imported score, each item's mean over its repeats.

    Raises:
        BrokenRecordError: Some items were not scored.
    """
    score = scores[0]
    mine, other = a.run.scores(score, a.variant), b.run.scores(scores[1], b.variant)
    for rows, side in ((mine, a), (other, b)):
        if rows.non_finite:
            raise BrokenRecordError(
                f"'{side.variant.name}' has {rows.non_finite} items of '{score.name}' without score."
            )
    bounded = difference_of(other.means - mine.means, (mine.variances, other.variances), mine.clusters)
    what = score.title, score.unit, score.better
    return _of_mean(score.name, what, (mine.means, other.means), bounded.mean, None)


def _answers(run: PairedRun, task: TaskRecord, mine: ItemRows, other: ItemRows) -> AnswerChanges:
    went = {name: int(mask.sum()) for name, mask in measure_items.transitions(other, mine).items()}
    baseline = run.baseline_items(task)
    accuracy = measure_items.accuracies(task.name, baseline, run.record.seed)[f"{task.name}_acc"]
    p = measure_items.flips_p(other, mine)
    return AnswerChanges(
        task=task.name,
        title=task.title,
        questions=len(mine.items),
        baseline_at_chance=measure_items.at_chance(accuracy, measure_items.chance(baseline)),
        right_to_wrong=went["right_to_wrong"],
        wrong_to_right=went["wrong_to_right"],
        wrong_to_other=went["wrong_to_other"],
        p_value=p,
        p_adjusted=p,
    )


def _items(side: DiffSide, task: TaskRecord) -> ItemRows:
    rows = side.run.items(task, side.variant)
    finite_items(rows, task.name, side.variant.name)
    return rows


def _difference(
    name: str,
    what: tuple[str, str, Better],
    pair: tuple[Floats, Floats],
    clusters: Clusters,
    floor: float | None,
) -> Difference:
    a, b = pair
    return _of_mean(name, what, pair, clustered_mean(b - a, clusters), floor)


def _of_mean(
    name: str, what: tuple[str, str, Better], pair: tuple[Floats, Floats], mean: Mean, floor: float | None
) -> Difference:
    title, unit, better = what
    a, b = pair
    ends = mean.interval()
    estimate = Estimate(mean.value, ends.low, ends.high, unit, better, mean.n, mean.clusters)
    p = _p_value(mean)
    result = Difference(
        name=name,
        title=title,
        a=float(a.mean()),
        b=float(b.mean()),
        difference=Metric.of(estimate),
        floor=floor,
        p_value=p,
        p_adjusted=p,
        verdict="the same" if np.array_equal(a, b) else "not resolved",
    )
    return judged(result, p)


def judged(one: Difference, p_adjusted: float | None) -> Difference:
    """Return the difference with its adjusted p-value, and what that says about B.

    One that is no larger than the noise floor is never a gain or a loss, however small its p-value.
    """
    return one.model_copy(update={"p_adjusted": p_adjusted, "verdict": _verdict(one, p_adjusted)})


def _verdict(one: Difference, p_adjusted: float | None) -> Verdict:
    value = one.difference.value or 0.0
    if one.verdict == "the same":
        return "the same"
    if one.floor is not None and abs(value) <= one.floor:
        return "inconclusive"
    if p_adjusted is None or p_adjusted > 1 - LEVEL:
        return "not resolved"
    return "better" if (value < 0) == (one.difference.better == "lower") else "worse"


def _p_value(mean: Mean) -> float | None:
    """Return two-sided, that the mean is 0; None where fewer than two clusters leave it without an error."""
    if mean.error is None or mean.freedom is None:
        return None
    if mean.error == 0:
        return 1.0 if mean.value == 0 else 0.0
    return float(2 * special.stdtr(mean.freedom, -abs(mean.value) / mean.error))


def _token_floors(runs: Sequence[PairedRun], columns: Sequence[str]) -> dict[str, float]:
    """Return by column how much the baseline differs from itself, the largest of what both runs measured."""
    floors: dict[str, list[float]] = {column: [] for column in columns}
    for run in runs:
        for floor in (v for v in run.done if v.role == "floor"):
            rows = run.tokens(floor)
            for column in columns:
                finite_tokens(rows, column, floor.name)
                floors[column].append(_away(rows, run.baseline_tokens, column))
    return {column: max(values) for column, values in floors.items() if values}


def _away(rows: TokenRows, baseline: TokenRows, column: str) -> float:
    if column == "nll":
        return abs(float((rows.of("nll") - baseline.of("nll")).mean()))
    mean = float(rows.of(column).mean())
    return 1 - mean if column == "top1_agreement" else abs(mean)


def _item_floors(runs: Sequence[tuple[PairedRun, TaskRecord]]) -> dict[str, float]:
    """Return how much the baseline's accuracy and its choices' KL differ from itself; empty without a floor."""
    floors: dict[str, list[float]] = {"acc": [], "choice_kl_nats": []}
    for run, task in runs:
        baseline = run.baseline_items(task)
        for floor in (v for v in run.done if v.role == "floor"):
            rows = run.items(task, floor)
            finite_items(rows, task.name, floor.name)
            floors["acc"].append(abs(float((rows.acc - baseline.acc).mean())))
            floors["choice_kl_nats"].append(float(measure_items.choice_kl_nats(rows, baseline).mean()))
    return {name: max(values) for name, values in floors.items() if values}
