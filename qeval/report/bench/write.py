"""`write_bench` writes a benchmark's page into its folder: bench.html, bench.md, summary.json, tables and plots."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qeval.files.atomic import write_text
from qeval.report import formatting
from qeval.report.bench import records, tables
from qeval.report.bench.pareto import trade_offs
from qeval.report.bench.plots import throughputs
from qeval.report.bench.quality import find_losses, losses
from qeval.report.bench.reference import Reference, read_references
from qeval.report.bench.summary import Summary, summarize
from qeval.report.document import Heading, Plot, Section, Table, TableCell
from qeval.report.privacy import short_names, strip_model, strip_paths, strip_record
from qeval.report.render import html_page, write_plots
from qeval.store.timings import BenchRecord, read_bench_record, read_timings


def write_bench(
    out: Path, *, quality: Path | None = None, reference: Sequence[str] = (), base: str | None = None
) -> Path:
    """Write the page of the benchmark in `out` next to its records, and return its path.

    `quality` is a finished comparison of the same model's variants (that in `out` itself, where there is one and none
    is given), `reference` names published tables, `base` is what 'x times' refers to: an engine, or ENGINE/VARIANT.

    Raises:
        UsageError: `out` holds no benchmark, a name is unknown, or the comparison is of something else.
        BrokenRecordError: records contradict one another, or are torn.
    """
    published = read_references(reference)
    record = _strip_places(read_bench_record(out))
    summary = summarize(record, read_timings(out, record.timings), base)
    plots = throughputs(summary)
    lost, warnings = (losses(quality, record), []) if quality is not None else find_losses(out, summary)
    planes = [] if lost is None else trade_offs(summary, *lost)
    write_plots([*plots, *planes], out)
    _write_tables(summary, out)
    heading = _heading(summary)
    parts = bench_sections(summary, plots, planes, published, [*_warnings(summary), *warnings])
    write_text(out / "bench.md", html_page("report.md.j2", heading, parts))
    write_text(out / "bench.html", html_page("report.html.j2", heading, parts))
    return out / "bench.html"


def _strip_places(record: BenchRecord) -> BenchRecord:
    """Return a record whose texts tell no place of the machine."""
    names = short_names(record.model)
    return record.model_copy(
        update={
            "model": strip_model(strip_record(record.model, names)),
            "command": strip_paths(record.command, names),
            "warnings": [strip_paths(warning, names) for warning in record.warnings],
            "opened": [
                each if each.reason is None else replace(each, reason=strip_paths(each.reason, names))
                for each in record.opened
            ],
        }
    )


def bench_sections(
    summary: Summary,
    plots: Sequence[Plot],
    planes: Sequence[Plot],
    published: Sequence[Reference],
    warnings: Sequence[str],
) -> list[Section]:
    """Return all sections in the order of reading."""
    missing = [table for table in (tables.unmeasured_table(summary),) if table is not None]
    gains = tuple(table for table in (tables.savings_table(summary, published),) if table.rows)
    spent = [table for table in (tables.energy_table(summary),) if table is not None]
    return [
        Section(
            "summary",
            "Summary",
            tuple(_sentences(summary)),
            tuple(planes),
            gains,
            warnings=tuple(warnings),
            notes=tuple(summary.record.model.notes),
        ),
        Section("speed", "Speed", (), tuple(plots), (tables.speeds_table(summary, published), *missing, *spent)),
        Section("memory", "Memory", tables=(tables.memory_table(summary),)),
        Section("tokens", "Generated tokens", tables=(tables.correctness_table(summary),)),
        Section("provenance", "Provenance", tables=(tables.engines_table(summary), _facts(summary))),
    ]


def _write_tables(summary: Summary, out: Path) -> None:
    for name, rows in records.records_by_table(summary).items():
        if rows:
            write_text(out / "tables" / f"{name}.csv", records.as_csv(rows))
    write_text(out / "summary.json", json.dumps(records.bench_json(summary), indent=2, allow_nan=False) + "\n")


def _heading(summary: Summary) -> Heading:
    record = summary.record
    about = (
        record.model.architecture,
        record.environment.processor,
        record.started[:10],
        f"qeval {record.environment.qeval}",
    )
    return Heading(f"{record.model.name}: what quantization buys", about)


def _warnings(summary: Summary) -> list[str]:
    """Return what was not measured, and what of it is withheld."""
    unfinished = [] if summary.record.finished else ["The benchmark was stopped; the same command goes on with it."]
    broken = [
        f"{each.system} is broken, and its speed is withheld: {formatting.percent(each.equal.value or 0.0)} of its "
        "tokens are those of its own variant's reference."
        for each in summary.correct.values()
        if each.broken
    ]
    failed = [
        f"{engine} could not run {formatting.listed(variants)}: {reason}"
        for (engine, reason), variants in _failed(summary)
    ]
    return [*unfinished, *summary.record.warnings, *broken, *failed]


def _failed(summary: Summary) -> Iterable[tuple[tuple[str, str], list[str]]]:
    """Yield the variants that an engine could not run, by engine and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in summary.record.opened:
        if each.reason is not None:
            reasons.setdefault((each.engine, each.reason), []).append(each.variant)
    return reasons.items()


def _sentences(summary: Summary) -> list[str]:
    """Return what was measured, what the base is, who gained most, and how to read the intervals."""
    systems = {row.system for row in summary.shown}
    places = {row.place for row in summary.rows}
    engines = {system.engine for system in systems}
    sentences = [
        f"{len(engines)} engines ran {len({system.variant for system in systems})} variants of "
        f"{summary.record.model.name} in {len(places)} "
        f"{'cell' if len(places) == 1 else 'cells'} of batch size and prompt length."
    ]

    # what ratios are against
    if summary.missing_base is not None:
        sentences.append(f"Nothing was measured of {summary.missing_base}, the base that was asked for.")
    sentences.append(
        "Nothing is told in times: there is nothing unquantized to tell it against."
        if summary.base is None
        else f"'Times' are against {summary.base} in the same cell; savings against each engine's own unquantized "
        "variant, where it has one."
    )

    gains = [(saving.speed_up.value, saving) for saving in summary.savings if saving.speed_up and saving.speed_up.value]
    if gains:
        _, best = max(gains, key=lambda pair: pair[0])
        speed_up = tables.times_cell(best.speed_up)
        batch, prompt = best.row.place
        sentences.append(
            f"{best.row.system} gains most in generating: {speed_up.text} {speed_up.interval or ''} against "
            f"{best.base} at batch {batch}, prompt {prompt}."
        )
    sentences.append(
        "Brackets hold 95 % intervals: of a median by order statistics, of a ratio of two medians by a bootstrap over "
        f"repeats (seed {summary.record.seed})."
    )
    return sentences


def _facts(summary: Summary) -> Table:
    rows = tuple((TableCell(key), TableCell(value)) for key, value in facts(summary.record))
    return Table("What it takes to measure this again", ("What", "Value"), rows)


def facts(record: BenchRecord) -> list[tuple[str, str]]:
    """Return the facts of a benchmark, key and value: the model, the texts, the machine, the command."""
    model, env, settings = record.model, record.environment, record.settings
    return [
        ("Command", record.command),
        ("Model", f"{model.name} ({model.source}), {model.architecture}, {model.parameters:,} parameters"),
        ("Weights, sha256", model.weights_sha256),
        ("Prompts", f"{settings.corpus}, sha256 {settings.corpus_sha256}"),
        (
            "Grid",
            f"batch {_numbers(settings.batches)}; prompt {_numbers(settings.prompts)}; "
            f"{settings.generate} generated tokens",
        ),
        (
            "Repeats",
            f"interleaved in random order (seed {record.seed}), {formatting.duration(settings.budget_seconds)} at most",
        ),
        ("Started, finished", f"{record.started}, {record.finished or 'not finished'}"),
        ("Time", formatting.duration(record.seconds)),
        ("Machine", f"{env.processor}, {env.cores} cores, {formatting.size(env.memory_bytes)}; {env.platform}"),
        ("Device", f"{settings.device}, {settings.provider}, {settings.threads} threads"),
        ("Software", f"qeval {env.qeval}, Python {env.python}, torch {env.torch}, transformers {env.transformers}"),
    ]


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
