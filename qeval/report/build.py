"""`build_report` turns a finished run folder into a `Report`: read, pair, measure, rank; no model, no torch."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from qeval.errors import QevalError
from qeval.report import (
    corpora,
    measure_chat,
    measure_items,
    measure_tokens,
)
from qeval.report.align import BASELINE_NAME, ItemRows, TokenRows
from qeval.report.contamination import unchecked, void
from qeval.report.measure_confidence import flips_by_margin, kl_by_entropy
from qeval.report.measure_models import (
    broken_metrics,
    drift_by_model,
    needles_by_model,
    require_finite,
    scores_by_model,
    traces_by_model,
)
from qeval.report.measure_parts import sum_over_joint
from qeval.report.measure_positions import kl_by_position
from qeval.report.model import (
    AnswerGroup,
    BaselineReport,
    ComparisonReport,
    Curve,
    EntropyBucket,
    Intervals,
    Kept,
    Metrics,
    Mix,
    PositionBucket,
    Provenance,
    Report,
    Task,
    TaskResult,
    VariantReport,
)
from qeval.report.notes import notes
from qeval.report.privacy import run_short_names, strip_model, strip_record
from qeval.report.published_figures import published_warnings
from qeval.report.run_rows import PairedRun
from qeval.report.soundness import impossible_baseline, remarks
from qeval.stats import bootstrap
from qeval.stats.bootstrap import Clusters, Floats
from qeval.store.run import ProtocolRecord, RunRecord, TaskRecord, VariantRecord

_CLUSTERS = "windows for tokens; subjects for questions, and questions where there is but one subject"


class _Tokens(NamedTuple):
    """Statistics of the token rows, by model; `kl` holds the rows of variants and parts whose KL is finite."""

    metrics: dict[str, Metrics]
    curves: dict[str, Curve | None]
    by_entropy: dict[str, list[EntropyBucket]]
    by_corpus: dict[str, dict[str, Metrics]]
    chat: dict[str, list[AnswerGroup]]
    by_position: dict[str, list[PositionBucket]]
    kl: dict[str, Floats]
    windows: Clusters | None


class _Items(NamedTuple):
    """Statistics of one task's rows, by model."""

    task: Task
    metrics: dict[str, Metrics]
    results: dict[str, TaskResult]


def build_report(run_dir: Path) -> Report:
    """Build the report of a finished run, from its record and its rows.

    Raises:
        UsageError: `run_dir` holds no run.
        BrokenRecordError: rows are missing, doubled, or not on the baseline's tokens and questions.
        QevalError: the baseline's own numbers are not finite.
    """
    return build_paired(PairedRun(run_dir))


def build_paired(rows: PairedRun) -> Report:
    """Build the report of a run whose rows may have been read already."""
    run = rows.record
    if reason := impossible_baseline(rows):
        raise QevalError(reason)

    # measure
    tokens = _tokens(rows, rows.protocol) if rows.protocol else _NO_TOKENS
    items = [_items(rows, task) for task in run.tasks]
    needles, scores = needles_by_model(rows), scores_by_model(rows)
    metrics, results = _merged(
        tokens,
        items,
        [drift_by_model(rows), needles.metrics, *traces_by_model(rows), *scores.metrics],
        [BASELINE_NAME, *(variant.name for variant in rows.done)],
    )
    variants = [
        _variant(each, run, metrics, results, tokens).model_copy(
            update={"score_flips": scores.flips[each.name], "needle": needles.cells.get(each.name, [])}
        )
        for each in run.variants
    ]
    tasks = [each.task for each in items]

    report = Report(
        schema_version=1,
        model=strip_model(run.model),
        baseline=BaselineReport(
            label=run.baseline_label,
            backend=rows.backend,
            bits_per_weight=run.baseline_bits_per_weight,
            size_bytes=run.baseline_size_bytes,
            metrics=metrics[BASELINE_NAME],
            tasks=results[BASELINE_NAME],
            needle=needles.cells.get(BASELINE_NAME, []),
            seconds=run.baseline_seconds,
        ),
        variants=mark_pareto(variants),
        comparisons=_comparisons(tokens, [each.name for each in run.variants if each.role == "variant"], run.seed),
        protocol=run.protocol,
        drift=run.drift,
        needle=run.needle,
        reasoning=run.reasoning,
        grammar=run.grammar,
        tasks=tasks,
        scores=run.scores,
        metrics_asked=run.metrics,
        intervals=_intervals(run.seed),
        notes=notes(run, tasks, metrics[BASELINE_NAME]) + unchecked(run) + rows.repeat_notes,
        warnings=[
            *filter(None, (rows.missing_chain, *(variant.void for variant in variants))),
            *remarks(rows),
            *run.warnings,
        ],
        provenance=_provenance(run),
    )
    report = report.model_copy(update={"warnings": [*published_warnings(report), *report.warnings]})
    return strip_record(report, run_short_names(run))


def quality(variant: VariantReport) -> float | None:
    """Return the loss that ranks a variant: KL, else the perplexity ratio; None where it isn't ranked.

    A model behind an endpoint never is: its size is not known, and of its KL there is a lower bound alone.
    """
    if variant.size_bytes is None:
        return None
    for name in ("kl_nats", "ppl_ratio"):
        if variant.status == "done" and variant.ranked and not variant.void and name in variant.metrics:
            return variant.metrics[name].value
    return None


def mark_pareto(variants: list[VariantReport]) -> list[VariantReport]:
    """Mark the variants that no other equals in size and loss and beats in one."""
    points = {v.name: (v.ranked_bytes, q) for v in variants if (q := quality(v)) is not None}
    front = {
        name
        for name, (size, loss) in points.items()
        if not any(s <= size and q <= loss and (s, q) != (size, loss) for s, q in points.values())
    }
    return [variant.model_copy(update={"pareto": variant.name in front}) for variant in variants]


_NO_TOKENS = _Tokens({}, {}, {}, {}, {}, {}, {}, None)


def _tokens(paired: PairedRun, protocol: ProtocolRecord) -> _Tokens:
    """Measure one model after the other, so that only one variant's rows are held next to the baseline's."""
    run, baseline = paired.record, paired.baseline_tokens
    wants_ppl = "ppl" in run.metrics
    base_metrics = measure_tokens.baseline_perplexity(baseline, protocol, run.seed) if wants_ppl else {}
    metrics = {BASELINE_NAME: base_metrics}
    require_finite(metrics[BASELINE_NAME])

    curves: dict[str, Curve | None] = {}
    by_entropy: dict[str, list[EntropyBucket]] = {}
    by_corpus: dict[str, dict[str, Metrics]] = {}
    chat: dict[str, list[AnswerGroup]] = {}
    by_position: dict[str, list[PositionBucket]] = {}
    kl: dict[str, Floats] = {}
    windows = None
    for variant in paired.done:
        name, rows = variant.name, paired.tokens(variant)
        metrics[name] = _token_metrics(rows, baseline, run, protocol)
        by_corpus[name] = corpora.by_corpus(rows, baseline, protocol, run)
        if protocol.chat:
            metrics[name] |= measure_chat.chat_metrics(rows, baseline, protocol.chat, run)
            chat[name] = measure_chat.answer_groups(rows, baseline, protocol.chat, run)
        if "kl" in run.metrics:
            curves[name] = measure_tokens.kl_curve(rows)
            by_entropy[name] = kl_by_entropy(rows, baseline, run.seed)
            by_position[name] = kl_by_position(rows, run.seed)
            counts = variant.role != "floor" and variant.twin is None and not rows.is_bounded
            if counts and not metrics[name]["kl_nats"].non_finite:
                kl[name], windows = rows.of("kl_nats"), rows.clusters("kl_nats")
    return _Tokens(metrics, curves, by_entropy, by_corpus, chat, by_position, kl, windows)


def _token_metrics(rows: TokenRows, baseline: TokenRows, run: RunRecord, protocol: ProtocolRecord) -> Metrics:
    metrics: Metrics = {}
    if "kl" in run.metrics:
        metrics |= measure_tokens.kl_metrics(rows, run.seed) | measure_tokens.kernel_metrics(rows, run.seed)
    if "ppl" in run.metrics:
        metrics |= measure_tokens.nll_metrics(rows, baseline, protocol, run.seed)
    return metrics | measure_tokens.delta_metrics(rows, run.seed)


def _items(paired: PairedRun, record: TaskRecord) -> _Items:
    task, seed, baseline = record.name, paired.record.seed, paired.baseline_items(record)
    models = {BASELINE_NAME: baseline}
    metrics = {BASELINE_NAME: measure_items.accuracies(task, baseline, seed)}
    require_finite(metrics[BASELINE_NAME])
    for variant in paired.done:
        rows = models[variant.name] = paired.items(record, variant)
        metrics[variant.name] = measure_items.accuracies(task, rows, seed)
        metrics[variant.name] |= measure_items.changes(task, rows, baseline, seed)
    guess = measure_items.chance(baseline)
    at_chance = measure_items.at_chance(metrics[BASELINE_NAME][f"{task}_acc"], guess)
    task_results = measure_items.results(record, models, BASELINE_NAME, seed)
    family = [variant.name for variant in paired.done if variant.role == "variant"]
    results = _with_margins(measure_items.adjusted(task_results, family), models, seed)
    return _Items(Task(record=record, chance=guess, baseline_at_chance=at_chance), metrics, results)


def _with_margins(results: dict[str, TaskResult], models: dict[str, ItemRows], seed: int) -> dict[str, TaskResult]:
    """Return the results with flips by the baseline's margin, where there are flips."""
    return {
        name: result
        if result.flips is None
        else result.model_copy(update={"flips_by_margin": flips_by_margin(models[name], models[BASELINE_NAME], seed)})
        for name, result in results.items()
    }


def _merged(
    tokens: _Tokens, items: list[_Items], more: list[dict[str, Metrics]], names: list[str]
) -> tuple[dict[str, Metrics], dict[str, dict[str, TaskResult]]]:
    """Return each model's metrics of all kinds, and its tasks' results."""
    metrics = {name: dict(tokens.metrics.get(name, {})) for name in names}
    for kind in more:
        for name in names:
            metrics[name] |= kind.get(name, {})
    for each in items:
        for name in names:
            metrics[name] |= each.metrics[name]
    results = {name: {each.task.record.name: each.results[name] for each in items} for name in names}
    return metrics, results


def _variant(
    record: VariantRecord,
    run: RunRecord,
    metrics: dict[str, Metrics],
    results: dict[str, dict[str, TaskResult]],
    tokens: _Tokens,
) -> VariantReport:
    own_metrics = metrics.get(record.name, {})
    size, whole = record.size_bytes, run.baseline_size_bytes
    broken = broken_metrics(own_metrics)
    status = "broken" if broken else record.status

    mix = None
    if record.groups:
        mix = Mix(
            importance=record.importance or "unnamed",
            budget_bits_per_weight=record.budget_bits_per_weight,
            groups=record.groups,
        )

    # the rest stands in the record as it is
    copied = (
        "name", "role", "method", "backend", "key", "grid", "granularity", "symmetric", "bits_per_weight",
        "bits_per_weight_model", "size_bytes", "input_scales", "details", "quantize_seconds", "score_seconds",
        "twin", "runtime", "parts", "expert_tokens",
    )  # fmt: skip
    return VariantReport(
        **{name: getattr(record, name) for name in copied},
        status=status,
        error=broken or record.error,
        saving=None if size is None or whole is None else 1 - size / whole,
        pareto=False,
        metrics=own_metrics,
        tasks=results.get(record.name, {}),
        kl_curve=tokens.curves.get(record.name),
        by_corpus=tokens.by_corpus.get(record.name, {}),
        chat=tokens.chat.get(record.name, []),
        kl_by_entropy=tokens.by_entropy.get(record.name, []),
        kl_by_position=tokens.by_position.get(record.name, []),
        parts_over_joint=sum_over_joint(record, tokens.kl, tokens.windows, run.seed),
        mix=mix,
        kept=_float_weights(record),
        void=void(run, record),
    )


def _float_weights(record: VariantRecord) -> list[Kept]:
    weights = Counter(weight.reason for weight in record.kept)
    parameters: Counter[str] = Counter()
    for weight in record.kept:
        parameters[weight.reason] += weight.parameters
    return [
        Kept(reason=reason, weights=count, parameters=parameters[reason]) for reason, count in weights.most_common()
    ]


def _comparisons(tokens: _Tokens, names: list[str], seed: int) -> list[ComparisonReport]:
    """Compare each variant with the next in KL, paired."""
    if tokens.windows is None:
        return []
    ranked = sorted(tokens.kl.keys() & set(names), key=lambda name: (float(tokens.kl[name].mean()), names.index(name)))
    return [
        ComparisonReport(
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
        "witness",
    )  # fmt: skip
    return Provenance(**{name: getattr(run, name) for name in copied})
