"""The findings in a few sentences; no difference is claimed whose interval holds zero."""

from qeval.report import words
from qeval.report.build import quality
from qeval.report.conventions import RATIO
from qeval.report.model import Comparison, Metric, Report, Task, Variant
from qeval.report.tables import baseline_name


def summary(report: Report) -> list[str]:
    """What was compared, who lost least at which size, what is not resolved, what failed."""
    ranked = sorted(((loss, v) for v in report.variants if (loss := quality(v)) is not None), key=lambda pair: pair[0])
    found = [_scope(report)]
    if ranked:
        found.append(_best(report, ranked[0][1]))
        found += _front(report, ranked[0][1])
    found += _order(report.comparisons) + _floor(report)
    found += [_task(report, task) for task in report.tasks if ranked]
    found += [f"{v.name} {_TROUBLE[v.status]}: {v.error}" for v in report.variants if v.status != "done"]
    return found


_TROUBLE = {"failed": "failed and was not scored", "broken": "is broken and was not ranked"}


def _scope(report: Report) -> str:
    base = report.baseline
    count = sum(v.ranked for v in report.variants)
    again = [v for v in report.variants if v.role == "variant" and not v.ranked]
    runtimes = [*dict.fromkeys(words.runtime(v.runtime.runtime) for v in again if v.runtime)]
    p = report.protocol
    on = [f"{p.windows} of {p.windows_available} windows of {p.corpus} ({p.name})"] if p else []
    on += [f"{task.record.items} questions of {task.record.title}" for task in report.tasks]
    on += [f"{report.drift.prompts} greedy continuations of {report.drift.generated} tokens"] if report.drift else []
    return (
        f"{count} quantized {'variant' if count == 1 else 'variants'} of {report.model.name} against its "
        f"{baseline_name(report)} ({base.label}; {words.size(base.size_bytes)}), paired on {words.listed(on)}."
        + (f" {words.listed(runtimes)} scored them too ({len(again)} more rows below)." if runtimes else "")
    )


def _best(report: Report, best: Variant) -> str:
    return (
        f"{best.name} lost least: {_loss(best)} at {best.bits_per_weight:.2f} bits per weight and "
        f"{words.size(best.size_bytes)}, {words.percent(best.saving)} less than the baseline."
    )


def _front(report: Report, best: Variant) -> list[str]:
    """The smaller variants that nothing beats at their size, the largest first; one of those whose sizes read alike."""
    smaller = sorted((v for v in report.variants if v.pareto and v.name != best.name), key=lambda v: v.size_bytes)
    shown = {words.size(v.size_bytes): v for v in smaller}  # the larger of two that read alike lost less
    return [
        f"Of those no bigger than {size} ({v.bits_per_weight:.2f} bits per weight, "
        f"{words.percent(v.saving)} saved), {v.name} lost least: {_loss(v)}."
        for size, v in reversed(shown.items())
        if size != words.size(best.size_bytes)
    ]


def _loss(variant: Variant) -> str:
    metrics = variant.metrics
    parts = []
    if "kl_nats" in metrics:
        parts.append(f"KL {words.metric_text(metrics['kl_nats'])} nats")
    if "top1_agreement" in metrics:
        parts.append(f"the same top token at {words.metric_text(metrics['top1_agreement'])} of positions")
    if "ppl_ratio" in metrics:
        parts.append(f"{RATIO.lower()} {words.metric_text(metrics['ppl_ratio'])}")
    return ", ".join(parts)


def _order(comparisons: list[Comparison]) -> list[str]:
    """Neighbours in rank whose order the data do not settle."""
    open_pairs = [c for c in comparisons if not excludes_zero(c.difference)]
    return [
        f"The order of {c.better_name} and {c.other_name} is not resolved: their KL differs by "
        f"{words.metric_text(c.difference, signed=True)} nats, paired."
        for c in open_pairs
    ]


def _floor(report: Report) -> list[str]:
    """The baseline against itself, and the variants whose KL is no larger than that: nothing is known of them."""
    floors = [(m, v.name) for v in report.variants if v.role == "floor" and (m := v.metrics.get("kl_nats")) and m.value]
    if not floors:
        return []
    floor, name = max(floors, key=lambda pair: pair[0].value or 0.0)
    under = [v.name for v in report.variants if (loss := quality(v)) is not None and loss <= (floor.value or 0.0)]
    told = (
        f"; {words.listed(under)} {'lies' if len(under) == 1 else 'lie'} no higher: inconclusive, not better"
        if under
        else ""
    )
    return [f"The noise floor ({name}: the baseline against itself) is a KL of {words.metric_text(floor)} nats{told}."]


def _task(report: Report, task: Task) -> str:
    key = f"{task.record.name}_acc"
    base = report.baseline.metrics[key]
    variants = [v for v in report.variants if v.role == "variant"]
    diffs = [(v.name, d) for v in variants if (d := v.metrics.get(f"{key}_diff")) and d.value is not None]
    lost = [f"{name} ({words.metric_text(d, signed=True)})" for name, d in diffs if d.high is not None and d.high < 0]
    told = f"{words.listed(lost)} lost accuracy" if lost else "no variant's loss of accuracy is resolved"
    chance = ", which guessing would give too" if task.baseline_at_chance else ""
    return f"{task.record.title}: the baseline answers {words.metric_text(base)} right{chance}; {told}."


def excludes_zero(metric: Metric) -> bool:
    """Whether an interval is there and leaves zero out."""
    return metric.low is not None and metric.high is not None and not metric.low <= 0 <= metric.high
