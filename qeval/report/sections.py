"""The page, part by part: the same sections for the markdown and for the HTML."""

from qeval.report import (
    chat,
    confidence,
    corpora,
    drift,
    expert_tables,
    formatting,
    loss_breakdown,
    mix_tables,
    needle,
    part_tables,
    tables,
)
from qeval.report.document import Plot, Section, Table, TableCell
from qeval.report.measure_scores import any_flips, response_sentences, score_flips_table, scores_table
from qeval.report.model import Report, Task, VariantReport
from qeval.report.plots import file_slug
from qeval.report.published_figures import published_table
from qeval.report.ranking import ranking
from qeval.report.recommendation import RULE, recommend
from qeval.report.summary import summary
from qeval.report.traces import trace_sections
from qeval.store.run import EnvironmentRecord, ModelRecord


def report_sections(report: Report, plots: list[Plot], rows: Section | None = None) -> list[Section]:
    """Return the sections that the report fills, in the order of reading; `rows` is the one about single rows."""
    drawn = {plot.name: plot for plot in plots}
    return [
        _summary(report, drawn),
        _variants(report),
        *([_perplexity(report, drawn)] if "ppl" in report.baseline.metrics else []),
        *([_kl(report, drawn)] if "kl" in report.metrics_asked and report.protocol else []),
        *(
            [loss_breakdown.loss_section(report, drawn.get("onnx-split"))]
            if any(v.runtime for v in report.variants)
            else []
        ),
        *([answers] if (answers := chat.chat_section(report)) else []),
        *([continuations] if (continuations := drift.drift_section(report)) else []),
        *([needles] if (needles := needle.needle_section(report)) else []),
        *trace_sections(report),
        *(_task(report, task, drawn) for task in report.tasks),
        *([_scores(report)] if report.scores else []),
        *([_published(table)] if (table := published_table(report)) else []),
        *([rows] if rows else []),
        *([_layers(report, drawn)] if any(v.mix for v in report.variants) else []),
        _provenance(report),
    ]


def intervals_sentence(report: Report) -> str:
    """Return how every interval of the page was made, said once."""
    i = report.intervals
    return (
        f"Brackets hold intervals: {i.method} (clusters: {i.clusters}; {i.resamples} resamples, "
        f"seed {i.seed}; percentile interval, widened where clusters are few). Each holds by "
        "itself: where many are looked through, some leave zero out by chance."
    )


def _summary(report: Report, drawn: dict[str, Plot]) -> Section:
    """Return the first screen: what to ship and why, quality against size, the ranking; all else is folded."""
    recommendation = recommend(report)
    scope, *findings = summary(report)
    return Section(
        id="summary",
        title="Summary",
        sentences=(*recommendation.sentences, scope),
        plots=_pick(drawn, "quality-size"),
        tables=(ranking(report, recommendation.variant),),
        warnings=tuple(report.warnings),
        notes=(*findings, *report.notes, RULE, intervals_sentence(report)),
    )


def _scores(report: Report) -> Section:
    flips = [score_flips_table(report, each) for each in report.scores if any_flips(report, each)]
    is_foreign = any(score.task is None for score in report.scores)
    return Section(
        id="scores",
        title="Imported scores" if is_foreign else "Tasks by score",
        sentences=tuple(response_sentences(report)),
        tables=(scores_table(report, report.scores), *flips),
    )


def _published(table: Table) -> Section:
    return Section(id="published", title="Published figures", tables=(table,))


def _variants(report: Report) -> Section:
    return Section(
        id="variants",
        title="Variants",
        tables=(
            tables.overview_table(report),
            *corpora.corpus_tables(report),
            tables.variants_table(report),
            tables.weights_in_float(report),
            *expert_tables.experts_tables(report),
        ),
    )


def _perplexity(report: Report, drawn: dict[str, Plot]) -> Section:
    return Section(
        id="perplexity",
        title="Perplexity",
        sentences=(_protocol(report),),
        plots=_pick(drawn, "perplexity"),
        tables=(tables.perplexity_table(report),),
    )


def _kl(report: Report, drawn: dict[str, Plot]) -> Section:
    compared = (tables.comparisons_table(report),) if report.comparisons else ()
    return Section(
        id="kl",
        title="KL-divergence",
        plots=(*_pick(drawn, "parts"), *_pick(drawn, "kl-distribution")),
        tables=(
            *part_tables.parts_table(report),
            tables.kl_table(report),
            *tables.sampling_table(report),
            tables.kl_tail(report),
            *([bounds] if (bounds := tables.lower_bound_table(report)) else []),
            *part_tables.positions_table(report),
            *confidence.by_entropy(report),
            *compared,
        ),
    )


def _task(report: Report, task: Task, drawn: dict[str, Plot]) -> Section:
    record = task.record
    parts = [tables.task_summary(report, task), tables.flips_table(report, task), *confidence.by_margin(report, task)]
    if record.categories:
        parts.append(tables.task_groups(report, task, "category"))
    if len(record.subjects) > 1:
        parts.append(tables.task_groups(report, task, "subject"))

    about = f"{record.items} questions, from {record.source}, through {record.harness}."
    chance = (
        (f"The baseline's accuracy cannot be told from guessing ({formatting.percent(task.chance)}).",)
        if task.baseline_at_chance
        else ()
    )
    return Section(
        id=f"task-{file_slug(record.name)}",
        title=record.title,
        sentences=(about, *chance),
        plots=_pick(drawn, f"{file_slug(record.name)}-categories") if record.categories else (),
        tables=tuple(parts),
    )


def _layers(report: Report, drawn: dict[str, Plot]) -> Section:
    mixed = [v for v in report.variants if v.mix]
    budgets = [
        f"{v.name}: {'formats' if mix_tables.formats_of(v.mix.groups) else 'bits'} given out by "
        f"{v.mix.importance} importance"
        + (
            f" under a budget of {v.mix.budget_bits_per_weight:g} bits per weight."
            if v.mix.budget_bits_per_weight
            else "."
        )
        for v in mixed
        if v.mix
    ]

    has_formats = any(mix_tables.formats_of(v.mix.groups) for v in mixed if v.mix)
    parts: list[Table] = []
    for v in mixed:
        parts += [table for table in (mix_tables.mix_table(v), mix_tables.sensitive_table(v)) if table]
    return Section(
        id="layers",
        title="Where the bits went" if has_formats else "Where the wider integers went",
        sentences=tuple(budgets),
        plots=tuple(plot for name, plot in drawn.items() if name.startswith("layers-")),
        tables=tuple(parts),
    )


def _provenance(report: Report) -> Section:
    rows = tuple((TableCell(key), TableCell(value)) for key, value in provenance(report))
    table = Table("What it takes to make this report again", ("What", "Value"), rows)

    times = tuple(
        (
            TableCell(v.name),
            TableCell(formatting.duration(v.quantize_seconds)),
            TableCell(formatting.duration(v.score_seconds)),
            TableCell(v.key),
            TableCell(_details(v)),
        )
        for v in report.variants
    )
    columns = ("Variant", "Quantizing", "Scoring", "Identity", "Details")
    return Section(
        id="provenance",
        title="Provenance",
        tables=(table, Table("Variants: times, identity, details", columns, times)),
    )


def provenance(report: Report) -> list[tuple[str, str]]:
    """Return what was measured on what, with what, by which command; key and value."""
    model, p, env = report.model, report.provenance, report.provenance.environment
    return [
        ("Command", p.command),
        ("Model", " ".join(filter(None, (model.name, f"({model.source})", model.hub_id, model.revision)))),
        ("Architecture", _architecture(model)),
        ("Weights, sha256", model.weights_sha256),
        ("Types", f"weights {model.weight_dtype}, computed in {model.compute_dtype}"),
        *_measured_on(report),
        ("Seed", str(p.seed)),
        ("Started, finished", f"{p.started}, {p.finished or 'not finished'}"),
        (
            "Time",
            f"{formatting.duration(p.seconds)}, of it the baseline {formatting.duration(report.baseline.seconds)}",
        ),
        ("Peak memory", formatting.size(p.peak_rss_bytes)),
        ("Machine", f"{env.processor}, {env.cores} cores, {formatting.size(env.memory_bytes)}; {env.platform}"),
        ("Device", _device(env)),
        (
            "Software",
            f"qeval {env.qeval}, Python {env.python}, torch {env.torch}, transformers {env.transformers}, "
            f"lm-eval {env.lm_eval}",
        ),
    ]


def _architecture(model: ModelRecord) -> str:
    if model.parameters is None:
        return model.architecture
    return f"{model.architecture}, {model.parameters:,} parameters, {model.layers} layers"


def _device(env: EnvironmentRecord) -> str:
    parts = [env.device, f"{env.threads} threads"]
    if env.gpus:
        parts[:1] = [f"{env.device} ({env.gpus} visible)", f"CUDA {env.cuda}", f"driver {env.driver or 'unknown'}"]
    if env.peak_gpu_bytes:
        parts.append(f"peak GPU memory {formatting.size(env.peak_gpu_bytes)}")
    return ", ".join(parts)


def _measured_on(report: Report) -> list[tuple[str, str]]:
    facts = []
    if report.protocol:
        p = report.protocol
        facts += [
            ("Protocol", _protocol(report)),
            ("Corpus, sha256", p.corpus_sha256),
            ("Token ids, sha256", p.tokens_sha256),
        ]
    if report.provenance.witness:
        facts.append(("Witness of all token ids, positions and BOS", report.provenance.witness))
    if report.provenance.calibration:
        c = report.provenance.calibration
        facts += [
            ("Calibration", f"{c.source}: {c.samples} samples of {c.length} tokens"),
            ("Calibration text, sha256", c.text_sha256),
        ]
    return facts


def _protocol(report: Report) -> str:
    p = report.protocol
    if p is None:
        return ""
    return (
        f"{p.name}: {p.windows} of {p.windows_available} windows of {p.window} tokens of {p.corpus}, "
        f"stride {p.stride}, {formatting.bos(p)}; perplexity by convention {p.convention}; NLL over "
        f"{p.nll_positions} positions, KL over {p.kl_positions}."
    )


def _details(variant: VariantReport) -> str:
    """Return the method's options in words, and the linears whose input is multiplied explicitly."""
    details = [f"{key}: {value}" for key, value in variant.details.items()]
    if variant.input_scales:
        details.append(f"explicit input scales: {', '.join(variant.input_scales)}")
    return "; ".join(details) or formatting.MISSING


def _pick(drawn: dict[str, Plot], *names: str) -> tuple[Plot, ...]:
    return tuple(drawn[name] for name in names if name in drawn)
