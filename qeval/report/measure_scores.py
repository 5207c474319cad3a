"""From scores to metrics: each model's mean, its paired difference from the baseline, and what flipped.

Scores are those of tasks without choices, or another program's. Intervals of means are t intervals clustered by subject
(by item where there is one subject), with what repeats add to all items alike counted in, and Wilson's of shares of
right answers; a gate bounds the same difference. Flips are shares of items, with bootstrap intervals as those of
questions have.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from scipy.stats import binomtest

from qeval.report.document import NOTHING, Table, TableCell, metric_cell
from qeval.report.model import Metric, Metrics, Report, ScoreFlips
from qeval.report.score_rows import ScoreRows
from qeval.stats import estimates
from qeval.stats.flips import holm, mcnemar
from qeval.stats.repeats import BoundedScore, Components, difference_of
from qeval.store.run import ScoreRecord
from qeval.types import Better, Estimate

_NOTHING = Components(None, 0.0, 1.0, 1)


def score_metrics(record: ScoreRecord, rows: ScoreRows, seed: int) -> Metrics:
    """Return one model's mean score, `NAME_score`, and the share of its answers that were cut at their most tokens.

    The mean has no value where items were not scored.
    """
    name, metrics = f"{record.name}_score", Metrics()
    if (cut := rows.cut_share) is not None:
        clusters = rows.clusters_of_scores
        share = estimates.mean(cut, clusters, unit="fraction", better="lower", seed=seed)
        metrics[f"{record.name}_cut"] = Metric.of(share)
    if rows.non_finite:
        return metrics | {name: Metric.broken(record.unit, record.better, len(rows.items), rows.non_finite)}
    metric = _metric(difference_of(rows.means, (rows.variances, _NOTHING), rows.clusters), record)
    return metrics | {name: _share_of_right(metric, rows) if rows.is_right_or_wrong else metric}


def _share_of_right(metric: Metric, rows: ScoreRows) -> Metric:
    """Return a share of right answers with an interval inside 0 and 1.

    Where each item is a cluster of its own that is Wilson's (JASA 22, 1927), which says something of 0 in 10 too.
    """
    if rows.clusters.count == len(rows.items):
        ends = binomtest(int(rows.means.sum()), len(rows.items)).proportion_ci(method="wilson")
        return metric.model_copy(update={"low": float(ends.low), "high": float(ends.high)})
    if metric.low is None or metric.high is None:
        return metric
    return metric.model_copy(update={"low": max(0.0, metric.low), "high": min(1.0, metric.high)})


def score_changes(record: ScoreRecord, rows: ScoreRows, baseline: ScoreRows, seed: int) -> Metrics:
    """Return a variant's mean score minus the baseline's, paired by item, and the shares of items that flipped."""
    name, bad = f"{record.name}_score_diff", rows.non_finite + baseline.non_finite
    if bad:
        return {name: Metric.broken(record.unit, record.better, len(rows.items), bad)}
    change = rows.means - baseline.means
    metrics = {name: _metric(difference_of(change, (baseline.variances, rows.variances), rows.clusters), record)}
    if not are_answers(record, rows, baseline):
        return metrics
    kinds: Mapping[str, tuple[np.ndarray, Better]] = {
        "flips": (change != 0, "lower"),
        "right_to_wrong": (change < 0, "lower"),
        "wrong_to_right": (change > 0, "higher"),
    }
    return metrics | {
        f"{record.name}_{kind}": Metric.of(
            estimates.mean(flipped, rows.clusters, unit="fraction", better=better, seed=seed)
        )
        for kind, (flipped, better) in kinds.items()
    }


def are_answers(record: ScoreRecord, rows: ScoreRows, baseline: ScoreRows) -> bool:
    """Return whether a score says right or wrong of one answer an item, on both sides."""
    return record.better == "higher" and rows.is_right_or_wrong and baseline.is_right_or_wrong


def count_score_flips(rows: ScoreRows, baseline: ScoreRows) -> ScoreFlips:
    """Return how many answers went which way, and McNemar's exact test of whether more flipped one way."""
    before, after = baseline.means == 1, rows.means == 1
    down, up = int((before & ~after).sum()), int((~before & after).sum())
    return ScoreFlips(
        right_to_right=int((before & after).sum()),
        right_to_wrong=down,
        wrong_to_right=up,
        wrong_to_wrong=int((~before & ~after).sum()),
        p=mcnemar(down, up),
    )


def adjusted_flips(flips: Mapping[str, ScoreFlips], family: Iterable[str]) -> dict[str, ScoreFlips]:
    """Return the flips of one score by variant, the tests of those named in `family` corrected together, after Holm."""
    names = [name for name in family if name in flips]
    corrected = dict(zip(names, holm([flips[name].p for name in names]), strict=True))
    return {name: each.model_copy(update={"p_adjusted": corrected.get(name)}) for name, each in flips.items()}


def scores_table(report: Report, scores: Iterable[ScoreRecord]) -> Table:
    """Return a row a model and score: the mean, the paired difference from the baseline, what was cut."""
    models = [(report.baseline.label, report.baseline.metrics), *((v.name, v.metrics) for v in report.variants)]
    listed = list(scores)
    has_cuts = any(f"{score.name}_cut" in report.baseline.metrics for score in listed)
    rows = tuple(
        (
            TableCell(score.title),
            TableCell(name),
            metric_cell(metrics.get(f"{score.name}_score")),
            metric_cell(metrics.get(f"{score.name}_score_diff"), signed=True),
            TableCell(f"{score.better} is better"),
            TableCell(f"{score.items:,}"),
            *([metric_cell(metrics.get(f"{score.name}_cut"))] if has_cuts else []),
        )
        for score in listed
        for name, metrics in models
    )
    columns = ("Score", "Model", "Mean", "Minus the baseline's, paired", "Direction", "Items")
    is_foreign = any(score.task is None for score in listed)
    title = "Scores that another program gave" if is_foreign else "Scores of tasks, by metric and filter"
    note = "Cut: answers that reached their most tokens before anything ended them." if has_cuts else None
    return Table(title, (*columns, *(["Cut"] if has_cuts else [])), rows, note)


def score_flips_table(report: Report, score: ScoreRecord) -> Table:
    """Return what became of each item's answer, by variant."""
    rows = []
    for variant in report.variants:
        flips, share = variant.score_flips.get(score.name), metric_cell(variant.metrics.get(f"{score.name}_flips"))
        if flips is None:
            rows.append((TableCell(variant.name), share, *([NOTHING] * 6)))
            continue
        counts = (flips.right_to_wrong, flips.wrong_to_right, flips.right_to_right, flips.wrong_to_wrong)
        tests = (NOTHING if p is None else TableCell(f"{p:.2g}") for p in (flips.p, flips.p_adjusted))
        rows.append((TableCell(variant.name), share, *(TableCell(str(count)) for count in counts), *tests))
    columns = (
        "Variant", "Flips", "Right → wrong", "Wrong → right", "Right, stayed", "Wrong, stayed", "p, McNemar",
        "p, adjusted",
    )  # fmt: skip
    note = "p: McNemar's exact test of whether more flipped one way; adjusted after Holm over the variants."
    return Table(f"{score.title}: flips", columns, tuple(rows), note)


def any_flips(report: Report, score: ScoreRecord) -> bool:
    """Return whether a score's items are right or wrong, so that flips of it are shown."""
    return any(score.name in variant.score_flips for variant in report.variants)


def response_sentences(report: Report) -> Iterator[str]:
    """Yield how each task was asked, and what of it was cut."""
    for task in {score.task.name: score.task for score in report.scores if score.task}.values():
        said = f"{task.name}: {task.items:,} items, {task.shots} examples, {task.output} by {task.harness}"
        if task.longest_answer:
            said += f", greedy answers of at most {task.longest_answer:,} tokens"
        if task.chat_template:
            said += f", under the chat template ({'each example a turn' if task.multiturn else 'examples in one turn'})"
        if task.system:
            said += ", after a system instruction"
        if task.cut_prompts:
            said += f"; {task.cut_prompts:,} prompts were cut on the left to fit the context"
        yield f"{said}."


def _metric(bounded: BoundedScore, record: ScoreRecord) -> Metric:
    mean = bounded.mean
    ends = mean.interval()
    return Metric.of(Estimate(mean.value, ends.low, ends.high, record.unit, record.better, mean.n, mean.clusters))
