"""`write_bench` writes a benchmark's page beside its records: bench.html, bench.md, summary.json, tables and plots."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from qeval.report import words
from qeval.report.bench import records, tables
from qeval.report.bench.planes import trade_offs
from qeval.report.bench.plots import throughputs
from qeval.report.bench.quality import losses, own_losses
from qeval.report.bench.reference import Reference, read_references
from qeval.report.bench.summary import Summary, summarize
from qeval.report.page import Cell, Heading, Plot, Section, Table
from qeval.report.render import page, write_plots
from qeval.store.atomic import write_text
from qeval.store.timings import BenchRecord, read_bench, read_timings


def write_bench(
    out: Path, *, quality: Path | None = None, reference: Sequence[str] = (), base: str | None = None
) -> Path:
    """Write the page of the benchmark in `out` beside its records; where it is.

    `quality` is a finished comparison of the same model's variants (that in `out` itself, where there is one and none
    is given), `reference` names published tables, `base` is what 'x times' refers to: an engine, or ENGINE/VARIANT.

    Raises:
        UsageError: `out` holds no benchmark, a name is unknown, or the comparison is of something else.
        BrokenRecordError: records contradict one another, or are torn.
    """
    published = read_references(reference)
    record = read_bench(out)
    found = summarize(record, read_timings(out, record.timings), base)
    plots = throughputs(found)
    lost, warnings = (losses(quality, record), []) if quality is not None else own_losses(out, found)
    planes = [] if lost is None else trade_offs(found, *lost)
    write_plots([*plots, *planes], out)
    _write_tables(found, out)
    heading, parts = _heading(found, warnings), sections(found, plots, planes, published)
    write_text(out / "bench.md", page("report.md.j2", heading, parts))
    write_text(out / "bench.html", page("report.html.j2", heading, parts))
    return out / "bench.html"


def sections(
    found: Summary, plots: Sequence[Plot], planes: Sequence[Plot], published: Sequence[Reference]
) -> list[Section]:
    """All sections in the order of reading."""
    missing = [table for table in (tables.unmeasured(found),) if table is not None]
    gains = tuple(table for table in (tables.savings(found, published),) if table.rows)
    spent = [table for table in (tables.energy(found),) if table is not None]
    return [
        Section("summary", "Summary", tuple(_sentences(found)), tuple(planes), gains),
        Section("speed", "Speed", (), tuple(plots), (tables.speeds(found, published), *missing, *spent)),
        Section("memory", "Memory", tables=(tables.memory(found),)),
        Section("tokens", "Generated tokens", tables=(tables.correctness(found),)),
        Section("provenance", "Provenance", tables=(tables.engines(found), _facts(found))),
    ]


def _write_tables(found: Summary, out: Path) -> None:
    for name, rows in records.tables(found).items():
        if rows:
            write_text(out / "tables" / f"{name}.csv", records.as_csv(rows))
    write_text(out / "summary.json", json.dumps(records.as_json(found), indent=2, allow_nan=False) + "\n")


def _heading(found: Summary, warnings: Sequence[str]) -> Heading:
    failed = tuple(
        f"{engine} could not run {words.listed(variants)}: {reason}" for (engine, reason), variants in _failed(found)
    )
    broken = tuple(
        f"{each.system} is broken, and its speed is withheld: {words.percent(each.equal.value or 0.0)} of its tokens "
        "are those of its own variant's reference."
        for each in found.correct.values()
        if each.broken
    )
    record = found.record
    about = (
        record.model.architecture,
        record.environment.processor,
        record.started[:10],
        f"qeval {record.environment.qeval}",
    )
    unfinished = () if record.finished else ("The benchmark was stopped; the same command goes on with it.",)
    return Heading(
        f"{record.model.name}: what quantization buys",
        about,
        tuple(record.model.notes),
        (*unfinished, *record.warnings, *warnings, *broken, *failed),
    )


def _failed(found: Summary) -> Iterable[tuple[tuple[str, str], list[str]]]:
    """The variants that an engine could not run, by engine and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found.record.opened:
        if each.reason is not None:
            reasons.setdefault((each.engine, each.reason), []).append(each.variant)
    return reasons.items()


def _sentences(found: Summary) -> list[str]:
    """What was measured, what the base is, who gained most, and how to read the intervals."""
    systems = {row.system for row in found.shown}
    places = {row.place for row in found.rows}
    engines = {system.engine for system in systems}
    said = [
        f"{len(engines)} engines ran {len({system.variant for system in systems})} variants of "
        f"{found.record.model.name} in {len(places)} "
        f"{'cell' if len(places) == 1 else 'cells'} of batch size and prompt length."
    ]
    if found.missing_base is not None:
        said.append(f"Nothing was measured of {found.missing_base}, the base that was asked for.")
    said.append(
        "Nothing is told in times: there is nothing unquantized to tell it against."
        if found.base is None
        else f"'Times' are against {found.base} in the same cell; savings against each engine's own unquantized "
        "variant, where it has one."
    )
    gains = [(saving.speed_up.value, saving) for saving in found.savings if saving.speed_up and saving.speed_up.value]
    if gains:
        _, best = max(gains, key=lambda pair: pair[0])
        speed_up = tables.times_cell(best.speed_up)
        batch, prompt = best.row.place
        said.append(
            f"{best.row.system} gains most in generating: {speed_up.text} {speed_up.interval or ''} against "
            f"{best.base} at batch {batch}, prompt {prompt}."
        )
    said.append(
        "Brackets hold 95 % intervals: of a median by order statistics, of a ratio of two medians by a bootstrap over "
        f"repeats (seed {found.record.seed})."
    )
    return said


def _facts(found: Summary) -> Table:
    rows = tuple((Cell(key), Cell(value)) for key, value in facts(found.record))
    return Table("What it takes to measure this again", ("What", "Value"), rows)


def facts(record: BenchRecord) -> list[tuple[str, str]]:
    """What was measured on what, by which command; key and value."""
    model, env, asked = record.model, record.environment, record.settings
    return [
        ("Command", record.command),
        ("Model", f"{model.name} ({model.source}), {model.architecture}, {model.parameters:,} parameters"),
        ("Weights, sha256", model.weights_sha256),
        ("Prompts", f"{asked.corpus}, sha256 {asked.corpus_sha256}"),
        (
            "Grid",
            f"batch {_numbers(asked.batches)}; prompt {_numbers(asked.prompts)}; {asked.generate} generated tokens",
        ),
        (
            "Repeats",
            f"interleaved in random order (seed {record.seed}), {words.duration(asked.budget_seconds)} at most",
        ),
        ("Started, finished", f"{record.started}, {record.finished or 'not finished'}"),
        ("Time", words.duration(record.seconds)),
        ("Machine", f"{env.processor}, {env.cores} cores, {words.size(env.memory_bytes)}; {env.platform}"),
        ("Device", f"{asked.device}, {asked.provider}, {asked.threads} threads"),
        ("Software", f"qeval {env.qeval}, Python {env.python}, torch {env.torch}, transformers {env.transformers}"),
    ]


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
