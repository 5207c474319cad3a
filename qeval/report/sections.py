"""The page, part by part: the same sections for the markdown and for the HTML."""

from qeval.report import drift, split, tables, words
from qeval.report.model import Report, Task, Variant
from qeval.report.page import Cell, Plot, Section, Table
from qeval.report.plots import slug
from qeval.report.summary import summary


def sections(report: Report, plots: list[Plot], rows: Section | None = None) -> list[Section]:
    """All sections that the report's content fills, in the order of reading; `rows` is the one about single rows."""
    drawn = {plot.name: plot for plot in plots}
    return [
        _summary(report, drawn),
        _variants(report),
        *([_perplexity(report, drawn)] if "ppl" in report.baseline.metrics else []),
        *([_kl(report)] if "kl" in report.metrics_asked and report.protocol else []),
        *([split.section(report, drawn.get("onnx-split"))] if any(v.runtime for v in report.variants) else []),
        *([found] if (found := drift.section(report)) else []),
        *(_task(report, task, drawn) for task in report.tasks),
        *([rows] if rows else []),
        *([_layers(report, drawn)] if any(v.mix for v in report.variants) else []),
        _provenance(report),
    ]


def intervals_sentence(report: Report) -> str:
    """How every interval of the page was made, said once."""
    i = report.intervals
    return (
        f"Brackets hold intervals: {i.method} (clusters: {i.clusters}; {i.resamples} resamples, "
        f"seed {i.seed}; percentile interval, widened where clusters are few). Each holds by "
        "itself: where many are looked through, some leave zero out by chance."
    )


def _summary(report: Report, drawn: dict[str, Plot]) -> Section:
    return Section(
        id="summary",
        title="Summary",
        sentences=(*summary(report), intervals_sentence(report)),
        plots=_pick(drawn, "quality-size", "kl-distribution"),
        tables=(tables.overview(report),),
    )


def _variants(report: Report) -> Section:
    return Section(id="variants", title="Variants", tables=(tables.variants(report), tables.kept(report)))


def _perplexity(report: Report, drawn: dict[str, Plot]) -> Section:
    return Section(
        id="perplexity",
        title="Perplexity",
        sentences=(_protocol(report),),
        plots=_pick(drawn, "perplexity"),
        tables=(tables.perplexity(report),),
    )


def _kl(report: Report) -> Section:
    compared = (tables.comparisons(report),) if report.comparisons else ()
    return Section(id="kl", title="KL-divergence", tables=(tables.kl(report), tables.kl_tail(report), *compared))


def _task(report: Report, task: Task, drawn: dict[str, Plot]) -> Section:
    record = task.record
    found = [tables.task_summary(report, task), tables.flips(report, task)]
    if record.categories:
        found.append(tables.task_groups(report, task, "category"))
    if len(record.subjects) > 1:
        found.append(tables.task_groups(report, task, "subject"))
    told = f"{record.items} questions, from {record.source}, through {record.harness}."
    chance = (
        (f"The baseline's accuracy cannot be told from guessing ({words.percent(task.chance)}).",)
        if task.baseline_at_chance
        else ()
    )
    return Section(
        id=f"task-{slug(record.name)}",
        title=record.title,
        sentences=(told, *chance),
        plots=_pick(drawn, f"{slug(record.name)}-categories") if record.categories else (),
        tables=tuple(found),
    )


def _layers(report: Report, drawn: dict[str, Plot]) -> Section:
    mixed = [v for v in report.variants if v.mix]
    told = [
        f"{v.name}: bits given out by {v.mix.importance} importance"
        + (
            f" under a budget of {v.mix.budget_bits_per_weight:g} bits per weight."
            if v.mix.budget_bits_per_weight
            else "."
        )
        for v in mixed
        if v.mix
    ]
    found: list[Table] = []
    for v in mixed:
        found += [table for table in (tables.mix(v), tables.sensitive(v)) if table]
    return Section(
        id="layers",
        title="Where the wider integers went",
        sentences=tuple(told),
        plots=tuple(plot for name, plot in drawn.items() if name.startswith("layers-")),
        tables=tuple(found),
    )


def _provenance(report: Report) -> Section:
    rows = tuple((Cell(key), Cell(value)) for key, value in provenance(report))
    table = Table("What it takes to make this report again", ("What", "Value"), rows)
    times = tuple(
        (
            Cell(v.name),
            Cell(words.duration(v.quantize_seconds)),
            Cell(words.duration(v.score_seconds)),
            Cell(v.key),
            Cell(_details(v)),
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
    """What was measured on what, with what, by which command; key and value."""
    model, p, env = report.model, report.provenance, report.provenance.environment
    return [
        ("Command", p.command),
        ("Model", " ".join(filter(None, (model.name, f"({model.source})", model.hub_id, model.revision)))),
        ("Architecture", f"{model.architecture}, {model.parameters:,} parameters, {model.layers} layers"),
        ("Weights, sha256", model.weights_sha256),
        ("Types", f"weights {model.weight_dtype}, computed in {model.compute_dtype}"),
        *_measured_on(report),
        ("Seed", str(p.seed)),
        ("Started, finished", f"{p.started}, {p.finished or 'not finished'}"),
        (
            "Time",
            f"{words.duration(p.seconds)}, of it the baseline {words.duration(report.baseline.seconds)}",
        ),
        ("Peak memory", words.size(p.peak_rss_bytes)),
        ("Machine", f"{env.processor}, {env.cores} cores, {words.size(env.memory_bytes)}; {env.platform}"),
        ("Device", f"{env.device}, {env.threads} threads"),
        (
            "Software",
            f"qeval {env.qeval}, Python {env.python}, torch {env.torch}, transformers {env.transformers}, "
            f"lm-eval {env.lm_eval}",
        ),
    ]


def _measured_on(report: Report) -> list[tuple[str, str]]:
    found = []
    if report.protocol:
        p = report.protocol
        found += [
            ("Protocol", _protocol(report)),
            ("Corpus, sha256", p.corpus_sha256),
            ("Token ids, sha256", p.tokens_sha256),
        ]
    if report.provenance.calibration:
        c = report.provenance.calibration
        found += [
            ("Calibration", f"{c.source}: {c.samples} samples of {c.length} tokens"),
            ("Calibration text, sha256", c.text_sha256),
        ]
    return found


def _protocol(report: Report) -> str:
    p = report.protocol
    if p is None:
        return ""
    start = "BOS starts each window" if p.bos else "no BOS"
    return (
        f"{p.name}: {p.windows} of {p.windows_available} windows of {p.window} tokens of {p.corpus}, "
        f"stride {p.stride}, {start}; NLL over {p.nll_positions} positions, KL over {p.kl_positions}."
    )


def _details(variant: Variant) -> str:
    """The method's options in words, and the linears whose input is multiplied explicitly."""
    found = [f"{key}: {value}" for key, value in variant.details.items()]
    if variant.input_scales:
        found.append(f"explicit input scales: {', '.join(variant.input_scales)}")
    return "; ".join(found) or words.MISSING


def _pick(drawn: dict[str, Plot], *names: str) -> tuple[Plot, ...]:
    return tuple(drawn[name] for name in names if name in drawn)
