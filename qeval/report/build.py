"""`build` turns a finished run folder into a `Report`: read, pair, measure, rank; no model, no torch."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from qeval.errors import QevalError
from qeval.report import measure_drift, measure_items, measure_tokens
from qeval.report.model import (
    Baseline,
    Comparison,
    Curve,
    Intervals,
    Kept,
    Metrics,
    Mix,
    Provenance,
    Report,
    Task,
    TaskResult,
    Variant,
)
from qeval.report.notes import notes
from qeval.report.paired import PairedRun
from qeval.report.pairing import BASELINE, TokenRows
from qeval.stats import bootstrap
from qeval.stats.bootstrap import Clusters, Floats
from qeval.store.run import RunRecord, TaskRecord, VariantRecord

_CLUSTERS = "windows for tokens; subjects for questions, and questions where there is but one subject"


class _Tokens(NamedTuple):
    """What the token rows gave, by model; `kl` holds the rows of variants whose KL is finite."""

    metrics: dict[str, Metrics]
    curves: dict[str, Curve | None]
    kl: dict[str, Floats]
    windows: Clusters | None


class _Items(NamedTuple):
    """What one task's rows gave, by model."""

    task: Task
    metrics: dict[str, Metrics]
    results: dict[str, TaskResult]


def build(run_dir: Path) -> Report:
    """The report of a finished run, from its record and its rows.

    Raises:
        UsageError: `run_dir` holds no run.
        BrokenRecordError: rows are missing, doubled, or not on the baseline's tokens and questions.
        QevalError: the baseline's own numbers are not finite.
    """
    return build_paired(PairedRun(run_dir))


def build_paired(rows: PairedRun) -> Report:
    """The same from a run whose rows may have been read already."""
    run = rows.record
    tokens = _tokens(rows) if rows.protocol else _NO_TOKENS
    items = [_items(rows, task) for task in run.tasks]
    metrics, results = _merged(tokens, items, _drift(rows), [BASELINE, *(variant.name for variant in rows.done)])
    variants = [_variant(each, run, metrics, results, tokens.curves) for each in run.variants]
    tasks = [each.task for each in items]
    return Report(
        schema_version=1,
        model=run.model,
        baseline=Baseline(
            label=run.baseline_label,
            backend=rows.backend,
            bits_per_weight=run.baseline_bits_per_weight,
            size_bytes=run.baseline_size_bytes,
            metrics=metrics[BASELINE],
            tasks=results[BASELINE],
            seconds=run.baseline_seconds,
        ),
        variants=mark_pareto(variants),
        comparisons=_comparisons(tokens, run.seed),
        protocol=run.protocol,
        drift=run.drift,
        tasks=tasks,
        metrics_asked=run.metrics,
        intervals=_intervals(run.seed),
        notes=notes(run, tasks, metrics[BASELINE]),
        warnings=run.warnings,
        provenance=_provenance(run),
    )


def quality(variant: Variant) -> float | None:
    """What variants are ranked by, lower being better: KL, else the perplexity ratio; None where it isn't ranked."""
    for name in ("kl_nats", "ppl_ratio"):
        if variant.status == "done" and variant.ranked and name in variant.metrics:
            return variant.metrics[name].value
    return None


def mark_pareto(variants: list[Variant]) -> list[Variant]:
    """The variants, marked where no other is as small and as near the baseline, and better in one."""
    points = {v.name: (v.size_bytes, q) for v in variants if (q := quality(v)) is not None}
    front = {
        name
        for name, (size, loss) in points.items()
        if not any(s <= size and q <= loss and (s, q) != (size, loss) for s, q in points.values())
    }
    return [variant.model_copy(update={"pareto": variant.name in front}) for variant in variants]


_NO_TOKENS = _Tokens({}, {}, {}, None)


def _tokens(paired: PairedRun) -> _Tokens:
    """One model after the other, so that only one variant's rows are held beside the baseline's."""
    run, baseline = paired.record, paired.baseline_tokens
    wants_ppl = "ppl" in run.metrics
    metrics = {BASELINE: measure_tokens.baseline_perplexity(baseline, run.seed) if wants_ppl else {}}
    _require_finite(metrics[BASELINE])
    curves: dict[str, Curve | None] = {}
    kl: dict[str, Floats] = {}
    windows = None
    for variant in paired.done:
        name, rows = variant.name, paired.tokens(variant)
        metrics[name] = _token_metrics(rows, baseline, run)
        if "kl" in run.metrics:
            curves[name] = measure_tokens.kl_curve(rows)
            if variant.role == "variant" and variant.twin is None and not metrics[name]["kl_nats"].non_finite:
                kl[name], windows = rows.of("kl_nats"), rows.clusters("kl_nats")
    return _Tokens(metrics, curves, kl, windows)


def _token_metrics(rows: TokenRows, baseline: TokenRows, run: RunRecord) -> Metrics:
    metrics: Metrics = {}
    if "kl" in run.metrics:
        metrics |= measure_tokens.kl_metrics(rows, run.seed) | measure_tokens.kernel_metrics(rows, run.seed)
    if "ppl" in run.metrics:
        metrics |= measure_tokens.nll_metrics(rows, baseline, run.seed)
    return metrics | measure_tokens.delta_metrics(rows, run.seed)


def _drift(paired: PairedRun) -> dict[str, Metrics]:
    """How each variant follows the baseline's continuations, by name; nothing where none were run."""
    if paired.record.drift is None:
        return {}
    seed = paired.record.seed
    return {variant.name: measure_drift.drift_metrics(paired.drift(variant), seed) for variant in paired.done}


def _items(paired: PairedRun, record: TaskRecord) -> _Items:
    task, seed, baseline = record.name, paired.record.seed, paired.baseline_items(record)
    models = {BASELINE: baseline}
    metrics = {BASELINE: measure_items.accuracies(task, baseline, seed)}
    _require_finite(metrics[BASELINE])
    for variant in paired.done:
        rows = models[variant.name] = paired.items(record, variant)
        metrics[variant.name] = measure_items.accuracies(task, rows, seed)
        metrics[variant.name] |= measure_items.changes(task, rows, baseline, seed)
    guess = measure_items.chance(baseline)
    at_chance = measure_items.at_chance(metrics[BASELINE][f"{task}_acc"], guess)
    found = measure_items.results(record, models, BASELINE, seed)
    results = measure_items.adjusted(found, [variant.name for variant in paired.done if variant.role == "variant"])
    return _Items(Task(record=record, chance=guess, baseline_at_chance=at_chance), metrics, results)


def _merged(
    tokens: _Tokens, items: list[_Items], drift: dict[str, Metrics], names: list[str]
) -> tuple[dict[str, Metrics], dict[str, dict[str, TaskResult]]]:
    """Each model's metrics of all kinds, and its tasks' results."""
    metrics = {name: tokens.metrics.get(name, {}) | drift.get(name, {}) for name in names}
    for each in items:
        for name in names:
            metrics[name] |= each.metrics[name]
    results = {name: {each.task.record.name: each.results[name] for each in items} for name in names}
    return metrics, results


def _require_finite(baseline: Metrics) -> None:
    if broken := _broken(baseline):
        raise QevalError(f"Nothing can be compared with this baseline. {broken}")


def _broken(metrics: Metrics) -> str | None:
    """Which numbers are not finite, in a sentence; None where all are."""
    bad = [f"{name} ({metric.non_finite} of {metric.n})" for name, metric in metrics.items() if metric.non_finite]
    return f"Values that are not finite: {', '.join(bad)}." if bad else None


def _variant(
    record: VariantRecord,
    run: RunRecord,
    metrics: dict[str, Metrics],
    results: dict[str, dict[str, TaskResult]],
    curves: dict[str, Curve | None],
) -> Variant:
    own = metrics.get(record.name, {})
    broken = _broken(own)
    status = "broken" if broken else record.status
    mix = None
    if record.groups:
        mix = Mix(
            importance=record.importance or "unnamed",
            budget_bits_per_weight=record.budget_bits_per_weight,
            groups=record.groups,
        )
    copied = (
        "name", "role", "method", "backend", "key", "grid", "granularity", "symmetric", "bits_per_weight",
        "bits_per_weight_model", "size_bytes", "input_scales", "details", "quantize_seconds", "score_seconds",
        "twin", "runtime",
    )  # fmt: skip
    return Variant(
        **{name: getattr(record, name) for name in copied},
        status=status,
        error=broken or record.error,
        saving=1 - record.size_bytes / run.baseline_size_bytes,
        pareto=False,
        metrics=own,
        tasks=results.get(record.name, {}),
        kl_curve=curves.get(record.name),
        mix=mix,
        kept=_kept(record),
    )


def _kept(record: VariantRecord) -> list[Kept]:
    weights = Counter(kept.reason for kept in record.kept)
    parameters: Counter[str] = Counter()
    for kept in record.kept:
        parameters[kept.reason] += kept.parameters
    return [
        Kept(reason=reason, weights=count, parameters=parameters[reason]) for reason, count in weights.most_common()
    ]


def _comparisons(tokens: _Tokens, seed: int) -> list[Comparison]:
    """Each variant against the next in KL, paired."""
    if tokens.windows is None:
        return []
    ranked = sorted(tokens.kl, key=lambda name: float(tokens.kl[name].mean()))
    return [
        Comparison(
            metric="kl_nats",
            better_name=better,
            other_name=other,
            difference=measure_tokens.kl_difference(tokens.kl[better], tokens.kl[other], tokens.windows, seed),
        )
        for better, other in pairwise(ranked)
    ]


def _intervals(seed: int) -> Intervals:
    return Intervals(
        level=bootstrap.LEVEL,
        method=bootstrap.METHOD,
        resamples=bootstrap.RESAMPLES,
        seed=seed,
        clusters=_CLUSTERS,
    )


def _provenance(run: RunRecord) -> Provenance:
    copied = (
        "command", "started", "finished", "seconds", "peak_rss_bytes", "seed", "environment", "calibration",
    )  # fmt: skip
    return Provenance(**{name: getattr(run, name) for name in copied})
