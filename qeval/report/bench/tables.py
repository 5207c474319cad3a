"""The tables of a benchmark's page: those of the field's own pages, with an interval at every median."""

from collections.abc import Sequence

from qeval.report import formatting
from qeval.report.bench.published import saving_rows, speed_rows
from qeval.report.bench.reference import Reference
from qeval.report.bench.rows import FIGURES, MeasuredRow, System
from qeval.report.bench.summary import Saving, Summary
from qeval.report.document import NOTHING, Table, TableCell, metric_cell
from qeval.report.model import Metric
from qeval.stats.median import FEWEST
from qeval.store.timings import LEAST_EQUAL, EngineRecord

_LIVE_FROM = 12  # rows
_STATES = {"oom": "OOM", "refused": "refused", "failed": "failed", "unspent": "no budget", "broken": "broken"}
_SYSTEM = ("Engine", "Variant")
_PLACE = ("Batch", "Prompt")


def speeds_table(summary: Summary, published: Sequence[Reference]) -> Table:
    """Return ONNX Runtime's LLaMA-2 table, one row a cell; published rows of the same cells follow, marked."""
    measured = [_speed_row(summary, row) for row in summary.runnable]
    published_rows, remark = speed_rows(summary, published)
    whole = summary.record.settings.generate
    columns = (
        *_SYSTEM, *_PLACE, "Prompt latency, ms", "Prompt throughput, tokens/s",
        *(f"First {count}: average {kind}" for count in (whole // 2, whole) for kind in ("latency, ms", "tokens/s")),
        "Wall-clock latency, s", "Wall-clock throughput, tokens/s",
    )  # fmt: skip
    note = (
        f"{_repeats(summary.rows)} Prompt latency ends with the choice of the first token, so it is the time to first "
        "token too; the first n generated tokens take n − 1 steps after it. Wall-clock figures are of the prompt and "
        "all generated tokens; no compiling or loading is in any of them." + remark
    )
    return _long("Latency and throughput by batch size and prompt length", columns, [*measured, *published_rows], note)


def savings_table(summary: Summary, published: Sequence[Reference]) -> Table:
    """Return Model Optimizer's table: what a quantized variant saves of memory, and how much faster it generates."""
    measured = [_saving_row(summary, saving) for saving in summary.savings]
    published_rows, remark = saving_rows(published)
    columns = (
        "Model", *_SYSTEM, "Base", *_PLACE, "Output tokens", "Memory saving", "Generation speed-up",
    )  # fmt: skip
    note = (
        "Saving is the base's peak memory while generating over the variant's, read once. Speed-up is the base's "
        "median latency of a generated token over the variant's: a ratio of medians, its interval a bootstrap over "
        "repeats." + remark
    )
    return _long(
        "Memory saving and generation speed-up against the unquantized base",
        columns,
        [*measured, *published_rows],
        note,
    )


def memory_table(summary: Summary) -> Table:
    """Return the table of memory by cell."""
    columns = (
        *_SYSTEM, *_PLACE, "Weights on disk", "Weights in memory", "Peak, prompt", "Peak, generating",
        "Keys and values", "Their share", "Saving",
    )  # fmt: skip
    by_cell = {(saving.row.system, saving.row.place): saving for saving in summary.savings}
    rows = [_memory_row(summary, row, by_cell.get((row.system, row.place))) for row in summary.runnable]
    note = (
        "Peaks are of the process that runs one engine with one variant (on a GPU: of the device's memory), so that "
        "they hold the runtime itself too. A dash: the engine can't tell. Share: of the peak while generating. "
        "Saving: as in the table above."
    )
    return _long("Memory by engine, variant and cell", columns, rows, note)


def correctness_table(summary: Summary) -> Table:
    """Return whether the tokens that the speeds are of are the variant's, one row a system."""
    systems = list(dict.fromkeys(row.system for row in summary.runnable))
    columns = (
        *_SYSTEM, "Generated tokens/s", "Tokens equal", "Prompts that diverge", "First at token", "KL there, nats",
        "Largest margin, nats", "Rejoins",
    )  # fmt: skip
    note = (
        "The engine runs freely, greedy, and the same variant's reference logits are asked after each of its tokens. "
        "Tokens equal: those that are the reference's most likely ones. Diverging: prompts with one that isn't; KL "
        "is KL(reference ‖ engine) at the first, the margin how much likelier the reference's choice is than the "
        "engine's. Rejoins: with the reference's token forced there the free run goes on as the reference does. Under "
        f"{formatting.percent(LEAST_EQUAL)} of equal tokens a model counts as broken and its speed is withheld."
    )
    rows = tuple(_correct_row(summary, system) for system in systems)
    return Table("Whether the generated tokens are the variant's own", columns, rows, note)


def engines_table(summary: Summary) -> Table:
    """Return the table of what ran: provider, types, threads, versions, and the time of opening and compiling."""
    columns = (*_SYSTEM, "Provider", "Arithmetic", "Weights", "Threads", "Version", "Loading", "Compiling")
    rows = tuple(_engine_row(each) for each in summary.record.opened)
    return Table("Engines and variants", columns, rows, "Loading and compiling are in no latency.")


def energy_table(summary: Summary) -> Table | None:
    """Return energy by cell; None where no device measures it."""
    rows = tuple(
        (*_where(row), metric_cell(row.figures["energy_joules"]), TableCell(_joules_a_token(row)))
        for row in summary.shown
        if "energy_joules" in row.figures
    )
    if not rows:
        return None
    return Table("Energy", (*_SYSTEM, *_PLACE, "Energy, J", "J by generated token"), rows, "Of the device alone.")


def unmeasured_table(summary: Summary) -> Table | None:
    """Return systems that could not run, and cells without figures, with reasons; None where there are none."""
    rows: list[tuple[TableCell, ...]] = [
        (
            TableCell(each.engine),
            TableCell(each.variant),
            NOTHING,
            NOTHING,
            TableCell("not run"),
            TableCell(each.reason),
        )
        for each in summary.record.opened
        if each.reason is not None
    ]
    rows += [
        (*_where(row), TableCell(_STATES[row.cell.outcome]), TableCell(row.cell.reason or formatting.MISSING))
        for row in summary.runnable
        if row.cell.outcome != "measured"
    ]
    if not rows:
        return None
    return Table("What was not measured, and why", (*_SYSTEM, *_PLACE, "Outcome", "Reason"), tuple(rows))


def times_cell(metric: Metric | None) -> TableCell:
    """Return a ratio with the sign that a reader takes for 'times'; a dash where it is undefined."""
    cell = metric_cell(metric)
    return cell._replace(text=f"{cell.text}×") if metric is not None and metric.value is not None else cell


def _speed_row(summary: Summary, row: MeasuredRow) -> tuple[TableCell, ...]:
    state = "broken" if summary.broken(row.system) and row.figures else row.cell.outcome
    if state == "oom":
        return *_where(row), *[TableCell(_STATES[state])] * len(FIGURES)
    if state != "measured":
        return *_where(row), NOTHING._replace(remark=_STATES[state]), *[NOTHING] * (len(FIGURES) - 1)
    return *_where(row), *(metric_cell(row.figures.get(name)) for name in FIGURES)


def _saving_row(summary: Summary, saving: Saving) -> tuple[TableCell, ...]:
    row, memory_saving = saving.row, saving.memory
    return (
        TableCell(summary.record.model.name),
        TableCell(row.cell.engine),
        TableCell(row.cell.variant),
        TableCell(str(saving.base)),
        TableCell(str(row.cell.batch)),
        TableCell(str(row.cell.prompt)),
        TableCell(str(row.generated)),
        NOTHING if memory_saving is None else TableCell(f"{memory_saving:.2f}×"),
        times_cell(saving.speed_up),
    )


def _memory_row(summary: Summary, row: MeasuredRow, saving: Saving | None) -> tuple[TableCell, ...]:
    opened, cell = summary.opened.get(row.system), row.cell
    share = NOTHING
    if cell.cache_bytes is not None and cell.peak_generate_bytes:
        share = TableCell(formatting.percent(cell.cache_bytes / cell.peak_generate_bytes, 1))
    return (
        *_where(row),
        _size(opened.disk_bytes if opened else None),
        _size(opened.weights_bytes if opened else None),
        _size(cell.peak_prompt_bytes),
        _size(cell.peak_generate_bytes),
        _size(cell.cache_bytes),
        share,
        NOTHING if saving is None or saving.memory is None else TableCell(f"{saving.memory:.2f}×"),
    )


def _correct_row(summary: Summary, system: System) -> tuple[TableCell, ...]:
    fastest = [row.figures["whole_tps"] for row in summary.shown if row.system == system and "whole_tps" in row.figures]
    speed = metric_cell(fastest[0]) if fastest else NOTHING
    each = summary.correct.get(system)
    if each is None:
        return TableCell(system.engine, remark="not checked"), TableCell(system.variant), speed, *[NOTHING] * 6
    first = NOTHING if each.first_divergence is None else TableCell(str(each.first_divergence))
    return (
        TableCell(system.engine, remark="broken" if each.broken else None),
        TableCell(system.variant),
        speed,
        metric_cell(each.equal),
        TableCell(f"{each.diverged} of {each.prompts}"),
        first,
        metric_cell(each.kl_nats),
        NOTHING if each.margin_nats is None else TableCell(f"{each.margin_nats:.2g}"),
        TableCell(f"{each.rejoined} of {each.diverged}") if each.diverged else NOTHING,
    )


def _engine_row(each: EngineRecord) -> tuple[TableCell, ...]:
    if each.reason is not None:
        return TableCell(each.engine, remark="not run"), TableCell(each.variant), *[NOTHING] * 7
    names = [TableCell(text or formatting.MISSING) for text in (each.provider, each.dtype, each.weights)]
    took = [
        NOTHING if s is None else TableCell(formatting.duration(s)) for s in (each.load_seconds, each.compile_seconds)
    ]
    return (
        TableCell(each.engine),
        TableCell(each.variant),
        *names,
        TableCell(str(each.threads)),
        TableCell(each.version),
        *took,
    )


def _where(row: MeasuredRow) -> tuple[TableCell, ...]:
    cell = row.cell
    return TableCell(cell.engine), TableCell(cell.variant), TableCell(str(cell.batch)), TableCell(str(cell.prompt))


def _joules_a_token(row: MeasuredRow) -> str:
    joules = row.figures["energy_joules"].value or 0.0
    return f"{joules / (row.cell.batch * row.generated):.3g}"


def _size(size_bytes: int | None) -> TableCell:
    return NOTHING if size_bytes is None else TableCell(formatting.size(size_bytes))


def _repeats(rows: Sequence[MeasuredRow]) -> str:
    counts = [row.repeats for row in rows if row.figures]
    if not counts:
        return "Nothing was measured."
    spread = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    few = f" (fewer than {FEWEST} have none)" if min(counts) < FEWEST else ""
    return f"Medians of {spread} repeats, with the 95 % interval of order statistics{few}."


def _long(caption: str, columns: tuple[str, ...], rows: list[tuple[TableCell, ...]], note: str) -> Table:
    return Table(caption, columns, tuple(rows), note, live=len(rows) > _LIVE_FROM, filters=(0, 1))
