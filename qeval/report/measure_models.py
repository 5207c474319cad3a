"""The metrics of every model of a run, by its name: along continuations, of needles, along traces, of scores."""

from typing import NamedTuple

from qeval.errors import QevalError
from qeval.report import measure_drift, measure_grammar, measure_reasoning, measure_scores
from qeval.report.align import BASELINE_NAME
from qeval.report.measure_needle import needle_cells, needle_metrics
from qeval.report.model import Metrics, NeedleCell, ScoreFlips
from qeval.report.run_rows import PairedRun


def drift_by_model(paired: PairedRun) -> dict[str, Metrics]:
    """Return how each variant follows the baseline's continuations, by name; nothing where none were run."""
    if paired.record.drift is None:
        return {}
    seed = paired.record.seed
    return {variant.name: measure_drift.drift_metrics(paired.drift(variant), seed) for variant in paired.done}


class NeedlesByModel(NamedTuple):
    """Every model's answers to needles, by its name: the metrics, and those of each length and depth."""

    metrics: dict[str, Metrics]
    cells: dict[str, list[NeedleCell]]


def needles_by_model(paired: PairedRun) -> NeedlesByModel:
    """Return every model's answers to needles; nothing where none was asked for."""
    if paired.record.needle is None:
        return NeedlesByModel({}, {})
    seed, baseline = paired.record.seed, paired.baseline_needles
    metrics = {BASELINE_NAME: needle_metrics(baseline, seed)}
    cells = {BASELINE_NAME: needle_cells(baseline, seed)}
    for variant in paired.done:
        rows = paired.needles(variant)
        metrics[variant.name] = needle_metrics(rows, seed, baseline)
        cells[variant.name] = needle_cells(rows, seed, baseline)
    return NeedlesByModel(metrics, cells)


def traces_by_model(paired: PairedRun) -> list[dict[str, Metrics]]:
    """Return every model's metrics along chains of thought and calls, by name, a task each."""
    seed, kinds = paired.record.seed, []
    measures = {
        "reasoning": (measure_reasoning.baseline_reasoning, measure_reasoning.reasoning_metrics),
        "grammar": (measure_grammar.baseline_grammar, measure_grammar.grammar_metrics),
    }
    for task in paired.traced:
        own, against = measures[task]
        baseline = paired.baseline_traces(task)
        metrics = {BASELINE_NAME: own(baseline, seed)}
        metrics |= {each.name: against(paired.traces(task, each), baseline, seed) for each in paired.done}
        kinds.append(metrics)
    return kinds


class ScoresByModel(NamedTuple):
    """Every model's scores: the metrics of each score by the model's name, and each variant's flips by score."""

    metrics: list[dict[str, Metrics]]
    flips: dict[str, dict[str, ScoreFlips]]


def scores_by_model(paired: PairedRun) -> ScoresByModel:
    """Return every model's means of each score, their differences from the baseline's, and flips of right answers."""
    kinds, seed = [], paired.record.seed
    found: dict[str, dict[str, ScoreFlips]] = {variant.name: {} for variant in paired.record.variants}
    family = [variant.name for variant in paired.done if variant.role == "variant"]
    for record in paired.record.scores:
        baseline = paired.baseline_scores(record)
        metrics = {BASELINE_NAME: measure_scores.score_metrics(record, baseline, seed)}
        require_finite(metrics[BASELINE_NAME])
        flips = {}
        for variant in paired.done:
            rows = paired.scores(record, variant)
            own = measure_scores.score_metrics(record, rows, seed)
            metrics[variant.name] = own | measure_scores.score_changes(record, rows, baseline, seed)
            if measure_scores.are_answers(record, rows, baseline):
                flips[variant.name] = measure_scores.count_score_flips(rows, baseline)
        kinds.append(metrics)
        for name, each in measure_scores.adjusted_flips(flips, family).items():
            found[name][record.name] = each
    return ScoresByModel(kinds, found)


def require_finite(baseline: Metrics) -> None:
    """Refuse a baseline that has numbers which are not finite.

    Raises:
        QevalError: It names them.
    """
    if broken := broken_metrics(baseline):
        raise QevalError(f"Nothing can be compared with this baseline. {broken}")


def broken_metrics(metrics: Metrics) -> str | None:
    """Return which numbers are not finite, in a sentence; None where all are."""
    bad = [f"{name} ({metric.non_finite} of {metric.n})" for name, metric in metrics.items() if metric.non_finite]
    return f"Values that are not finite: {', '.join(bad)}." if bad else None
