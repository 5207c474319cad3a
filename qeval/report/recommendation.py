"""Recommend a variant to ship, by one rule, and say why in two sentences. The figures are the report's own."""

from collections.abc import Sequence
from math import inf, isinf
from typing import NamedTuple

from qeval.report import formatting
from qeval.report.build import quality
from qeval.report.floors import largest_floor
from qeval.report.model import Metric, Report, Task, VariantReport

CLOSE = 1.5
"""A KL of at most so many times the lowest is close to it."""
SAME_SIZE = 1.01
"""Sizes whose ratio is at most this count as equal."""

RULE = (
    "The rule of the recommendation: of the variants without a resolved loss of accuracy (above the noise floor's, on "
    "tasks that the baseline answers better than guessing), it is the smallest whose KL is close to the lowest: the "
    f"upper end of its interval is at most {CLOSE:g} times the lowest KL, or no higher than the noise floor. "
    f"Sizes within {SAME_SIZE - 1:.0%} count as equal; of those the lowest KL decides."
)

_DEMO = (
    "The demo model shows what a report looks like: its weights lie on a 4-bit grid already, so choose no method by it."
)


class Recommendation(NamedTuple):
    """The name of the variant to ship, None where the run settles none, and the reason in sentences."""

    variant: str | None
    sentences: tuple[str, ...]


def recommend(report: Report) -> Recommendation:
    """Return the smallest variant whose loss is close to the least, by `RULE`."""
    measured = [v for v in report.variants if quality(v) is not None and "kl_nats" in v.metrics]
    if reason := _no_choice(report, measured):
        return Recommendation(None, (f"Nothing is recommended: {reason}",))

    lossless = [v for v in measured if not _accuracy_losses(report, v)]
    if not lossless:
        lost = "; ".join(f"{v.name} {formatting.listed(_accuracy_losses(report, v))}" for v in measured)
        return Recommendation(None, (f"Nothing is recommended: every variant loses accuracy ({lost}).",))

    best = min(lossless, key=_kl)
    close = [best, *(v for v in lossless if _upper(v) <= max(CLOSE * _kl(best), _floor(report)))]
    smallest = min(v.ranked_bytes for v in close)
    chosen = min((v for v in close if v.ranked_bytes <= SAME_SIZE * smallest), key=_kl)
    smaller = [v for v in measured if SAME_SIZE * v.ranked_bytes < chosen.ranked_bytes]
    caveat = (_DEMO,) if report.model.source == "demo" else ()
    return Recommendation(chosen.name, (_choice(report, chosen, best), _rest(report, chosen, smaller), *caveat))


def _no_choice(report: Report, measured: Sequence[VariantReport]) -> str | None:
    """Return why nothing can be chosen, None where something can."""
    variants = [v for v in report.variants if v.ranked]
    reasons = {
        "no variant was scored.": not variants,
        "every variant is void, calibrated on what it was scored on.": all(v.void for v in variants),
        "the run measured no KL, by which variants are chosen.": "kl" not in report.metrics_asked,
        "no variant has a finite KL that counts.": not measured,
        "only one variant has a KL that counts, which leaves nothing to choose from.": len(measured) == 1,
        "the KLs have no intervals, since the scored text is one cluster.": all(isinf(_upper(v)) for v in measured),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _choice(report: Report, chosen: VariantReport, best: VariantReport) -> str:
    size = f"{formatting.size(chosen.size_bytes)} ({formatting.percent(chosen.saving)} less than the baseline)"
    loss = f"{formatting.metric_text(chosen.metrics['kl_nats'])} nats"
    if chosen.name == best.name:
        return f"Ship {chosen.name}: it has the lowest KL, {loss}, at {size}."
    if _upper(chosen) <= _floor(report):
        near = "no higher than the noise floor"
    else:
        lowest = f"{formatting.value_text(best.metrics['kl_nats'])} of {best.name} ({formatting.size(best.size_bytes)})"
        near = f"at most {CLOSE:g} times the lowest, {lowest}"
    return f"Ship {chosen.name}: at {size} it is the smallest whose KL, {loss}, is {near}."


def _rest(report: Report, chosen: VariantReport, smaller: Sequence[VariantReport]) -> str:
    """Return what is known of the chosen one's accuracy, and why none of the smaller ones was chosen."""
    differences = [
        f"{task.record.title} {formatting.metric_text(difference, signed=True)}"
        for task in _tasks(report)
        if (difference := _difference(chosen, task)) is not None
    ]
    if differences:
        accuracy = f"No loss of accuracy is resolved ({'; '.join(differences)})"
    elif report.tasks:
        accuracy = "Accuracy decides nothing, since the baseline's cannot be told from guessing"
    else:
        accuracy = "Accuracy was not measured"
    if not smaller:
        return f"{accuracy}; no smaller variant was measured."

    nearest = min(smaller, key=_kl)
    if losses := _accuracy_losses(report, nearest):
        but = f"loses accuracy ({'; '.join(losses)})"
    else:
        kl = formatting.metric_text(nearest.metrics["kl_nats"])
        but = f"its KL, {kl} nats, is not shown to be within {CLOSE:g} times the lowest"
    among = "is smaller" if len(smaller) == 1 else f"lost least of the {len(smaller)} that are smaller"
    return f"{accuracy}; {nearest.name} {among} ({formatting.size(nearest.size_bytes)}), but {but}."


def _accuracy_losses(report: Report, variant: VariantReport) -> list[str]:
    """Return the tasks on which a variant's loss of accuracy is resolved and above the noise floor's, with the loss."""
    losses = []
    for task in _tasks(report):
        difference = _difference(variant, task)
        if difference is None or difference.high is None or difference.high >= 0:
            continue
        floors = [_difference(v, task) for v in report.variants if v.role == "floor"]
        if (difference.value or 0.0) < min((f.value or 0.0 for f in floors if f is not None), default=0.0):
            losses.append(f"{task.record.title} {formatting.metric_text(difference, signed=True)}")
    return losses


def _tasks(report: Report) -> list[Task]:
    return [task for task in report.tasks if not task.baseline_at_chance]


def _difference(variant: VariantReport, task: Task) -> Metric | None:
    metric = variant.metrics.get(f"{task.record.name}_acc_diff")
    return None if metric is None or metric.value is None else metric


def _kl(variant: VariantReport) -> float:
    value = variant.metrics["kl_nats"].value
    return inf if value is None else value


def _upper(variant: VariantReport) -> float:
    """Return the upper end of a KL's interval; infinite where there is none, so that nothing is claimed of it."""
    high = variant.metrics["kl_nats"].high
    return inf if high is None else high


def _floor(report: Report) -> float:
    floor = largest_floor(report.variants)
    return 0.0 if floor is None else floor[1].value or 0.0
