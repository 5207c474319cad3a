"""`render` writes a benchmark's page beside its records: bench.html, bench.md, summary.json, tables and plots."""

import json
from collections.abc import Sequence
from pathlib import Path

from qeval.report import words
from qeval.report.bench import records, tables
from qeval.report.bench.planes import trade_offs
from qeval.report.bench.plots import throughputs
from qeval.report.bench.quality import losses
from qeval.report.bench.reference import Reference, read_references
from qeval.report.bench.rows import Bench
from qeval.report.bench.summary import Summary, summarize
from qeval.report.page import Cell, Heading, Plot, Section, Table
from qeval.report.render import page, write_plots
from qeval.store.atomic import write_text


def render(
    bench: Bench, out: Path, *, quality: Path | None = None, reference: Sequence[str] = (), base: str | None = None
) -> Path:
    """Write everything under `out`; where the page is.

    `quality` is a finished comparison of the same model's variants, `reference` names published tables, `base` is what
    'x times' refers to: an engine, or ENGINE/VARIANT.

    Raises:
        UsageError: a name is unknown, or the comparison is of something else.
        BrokenRecordError: records contradict one another, or are torn.
    """
    published = read_references(reference)
    found = summarize(bench, base)
    plots = throughputs(found)
    planes = [] if quality is None else trade_offs(found, *losses(quality, found))
    write_plots([*plots, *planes], out)
    _write_tables(found, out)
    heading, parts = _heading(found), sections(found, plots, planes, published)
    write_text(out / "bench.md", page("report.md.j2", heading, parts))
    write_text(out / "bench.html", page("report.html.j2", heading, parts))
    return out / "bench.html"


def sections(
    found: Summary, plots: Sequence[Plot], planes: Sequence[Plot], published: Sequence[Reference]
) -> list[Section]:
    """All sections in the order of reading."""
    missing = [table for table in (tables.unmeasured(found),) if table is not None]
    spent = [table for table in (tables.energy(found),) if table is not None]
    return [
        Section("summary", "Summary", tuple(_sentences(found)), tuple(planes), (tables.savings(found, published),)),
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


def _heading(found: Summary) -> Heading:
    failed = tuple(
        f"{each.engine} could not run {each.variant}: {each.reason}"
        for each in found.bench.opened
        if each.reason is not None
    )
    broken = tuple(
        f"{each.system} is broken, and its speed is withheld: {words.percent(each.equal.value or 0.0)} of its tokens "
        "are those of its own variant's reference."
        for each in found.correct.values()
        if each.broken
    )
    return Heading(f"{found.bench.model}: what quantization buys", (), warnings=(*broken, *failed))


def _sentences(found: Summary) -> list[str]:
    """What was measured, what the base is, who gained most, and how to read the intervals."""
    systems = {row.system for row in found.shown}
    places = {row.place for row in found.rows}
    engines = {system.engine for system in systems}
    said = [
        f"{len(engines)} engines ran {len({system.variant for system in systems})} variants of {found.bench.model} in "
        f"{len(places)} cells of batch size and prompt length."
    ]
    said.append(
        "Nothing unquantized was measured, so nothing is told in times."
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
        f"repeats (seed {found.bench.seed})."
    )
    return said


def _facts(found: Summary) -> Table:
    rows = tuple((Cell(key), Cell(value)) for key, value in found.bench.facts)
    return Table("What it takes to measure this again", ("What", "Value"), rows)
