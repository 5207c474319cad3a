"""The findings in a few sentences; no difference is claimed whose interval holds zero."""

from qeval.report import formatting
from qeval.report.build import quality
from qeval.report.conventions import RATIO
from qeval.report.floors import largest_floor
from qeval.report.model import ComparisonReport, Metric, Report, Task, VariantReport
from qeval.report.tables import baseline_name
from qeval.store.run import ScoreRecord


def summary(report: Report) -> list[str]:
    """Return the findings: what was compared, who lost least at which size, what is not resolved, what failed."""
    ranked = sorted(((loss, v) for v in report.variants if (loss := quality(v)) is not None), key=lambda pair: pair[0])
    sentences = [_scope(report)]
    if ranked:
        sentences.append(_best(report, ranked[0][1]))
        sentences += _front(report, ranked[0][1])
    sentences += _order(report.comparisons) + _floor(report)
    sentences += [_task(report, task) for task in report.tasks if ranked or report.model.source == "imported"]
    sentences += [_score(report, score) for score in report.scores]
    sentences += [f"{v.name} {_TROUBLE[v.status]}: {v.error}" for v in report.variants if v.status != "done"]
    return sentences


def offline_texts(report: Report) -> str | None:
    """Return the sentence on a run of the texts that are shipped instead of published ones; None where it has none.

    The demo model's own texts are these.
    """
    on_pydoc = report.protocol is not None and report.protocol.corpus == "pydoc"
    texts = ["the Python reference instead of WikiText-2"] if on_pydoc else []
    if any(task.record.source == "mmlu_sample" for task in report.tasks):
        texts.append("a sample of questions written for this project instead of MMLU")
    if report.model.source == "demo" or not texts:
        return None
    return f"Offline texts: {' and '.join(texts)}. No figure here can be laid beside a published one."


_TROUBLE = {"failed": "failed and was not scored", "broken": "is broken and was not ranked"}


def _scope(report: Report) -> str:
    base = report.baseline
    count = sum(v.ranked for v in report.variants)
    again = [v for v in report.variants if v.role == "variant" and not v.ranked]
    runtimes = [*dict.fromkeys(formatting.runtime(v.runtime.runtime) for v in again if v.runtime)]
    p = report.protocol
    on = [f"{p.windows} of {p.windows_available} windows of {p.corpus} ({p.name})"] if p else []
    on += [f"{task.record.items} questions of {task.record.title}" for task in report.tasks]
    on += [f"{report.drift.prompts} greedy continuations of {report.drift.generated} tokens"] if report.drift else []
    if report.needle:
        on.append(
            f"needles at {len(report.needle.depths)} depths of haystacks of {max(report.needle.lengths):,} tokens"
        )
    on += [f"{report.reasoning.questions} chains of thought"] if report.reasoning else []
    on += [f"{len(report.grammar.traces)} calls of functions"] if report.grammar else []
    on += [f"{score.items} items of {score.title}" for score in report.scores]
    is_imported = report.model.source == "imported"
    size = "" if is_imported else f"; {formatting.size(base.size_bytes)}"
    return (
        f"{count}{'' if is_imported else ' quantized'} {'variant' if count == 1 else 'variants'} of "
        f"{report.model.name} against its {baseline_name(report)} ({base.label}{size}), "
        f"paired on {formatting.listed(on)}."
        + (f" {formatting.listed(runtimes)} scored them too ({len(again)} more rows below)." if runtimes else "")
    )


def _best(report: Report, best: VariantReport) -> str:
    return (
        f"{best.name} lost least: {_loss(best)} at {best.bits_per_weight:.2f} bits per weight and "
        f"{formatting.size(best.size_bytes)}, {formatting.percent(best.saving)} less than the baseline."
    )


def _front(report: Report, best: VariantReport) -> list[str]:
    """Return the smaller variants that nothing beats at their size, the largest first; one of sizes that read alike."""
    smaller = sorted((v for v in report.variants if v.pareto and v.name != best.name), key=lambda v: v.ranked_bytes)
    shown = {formatting.size(v.size_bytes): v for v in smaller}  # the larger of two that read alike lost less
    return [
        f"Of those no bigger than {size} ({v.bits_per_weight:.2f} bits per weight, "
        f"{formatting.percent(v.saving)} saved), {v.name} lost least: {_loss(v)}."
        for size, v in reversed(shown.items())
        if size != formatting.size(best.size_bytes)
    ]


def _loss(variant: VariantReport) -> str:
    metrics = variant.metrics
    parts = []
    if "kl_nats" in metrics:
        parts.append(f"KL {formatting.metric_text(metrics['kl_nats'])} nats")
    if "top1_agreement" in metrics:
        parts.append(f"the same top token at {formatting.metric_text(metrics['top1_agreement'])} of positions")
    if "ppl_ratio" in metrics:
        parts.append(f"{RATIO.lower()} {formatting.metric_text(metrics['ppl_ratio'])}")
    return ", ".join(parts)


def _order(comparisons: list[ComparisonReport]) -> list[str]:
    """Return neighbours in rank whose order the data do not settle."""
    open_pairs = [c for c in comparisons if not excludes_zero(c.difference)]
    return [
        f"The order of {c.better_name} and {c.other_name} is not resolved: their KL differs by "
        f"{formatting.metric_text(c.difference, signed=True)} nats, paired."
        for c in open_pairs
    ]


def _floor(report: Report) -> list[str]:
    """Return a sentence on the noise floor and on the variants whose KL is no larger: nothing is known of them."""
    if (largest := largest_floor(report.variants)) is None:
        return []
    variant, floor = largest
    under = [v.name for v in report.variants if (loss := quality(v)) is not None and loss <= (floor.value or 0.0)]
    inconclusive = (
        f"; {formatting.listed(under)} {'lies' if len(under) == 1 else 'lie'} no higher: inconclusive, not better"
        if under
        else ""
    )
    size = f"a KL of {formatting.metric_text(floor)} nats"
    return [f"The noise floor ({variant.name}: the baseline against itself) is {size}{inconclusive}."]


def _score(report: Report, score: ScoreRecord) -> str:
    """Return which variants' scores are certainly worse than the baseline's."""
    worse = [
        f"{v.name} ({formatting.metric_text(d, signed=True)})"
        for v in report.variants
        if (d := v.metrics.get(f"{score.name}_score_diff")) and _is_worse(d, score)
    ]
    return f"{score.title}: {formatting.listed(worse) + ' lost' if worse else 'no loss is resolved'}."


def _is_worse(difference: Metric, score: ScoreRecord) -> bool:
    if difference.low is None or difference.high is None:
        return False
    return difference.high < 0 if score.better == "higher" else difference.low > 0


def _task(report: Report, task: Task) -> str:
    key = f"{task.record.name}_acc"
    base = report.baseline.metrics[key]
    variants = [v for v in report.variants if v.role == "variant"]
    diffs = [(v.name, d) for v in variants if (d := v.metrics.get(f"{key}_diff")) and d.value is not None]
    certain = [(name, d) for name, d in diffs if d.high is not None and d.high < 0]
    lost = [f"{name} ({formatting.metric_text(d, signed=True)})" for name, d in certain]
    losses = f"{formatting.listed(lost)} lost accuracy" if lost else "no variant's loss of accuracy is resolved"
    chance = ", which guessing would give too" if task.baseline_at_chance else ""
    return f"{task.record.title}: the baseline answers {formatting.metric_text(base)} right{chance}; {losses}."


def excludes_zero(metric: Metric) -> bool:
    """Return whether an interval is there and leaves zero out."""
    return metric.low is not None and metric.high is not None and not metric.low <= 0 <= metric.high
