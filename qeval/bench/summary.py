"""The table at the end of a benchmark: one line a cell."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from qeval.stats.median import median
from qeval.store.timings import BenchRecord, CellRecord, Timing, read_timings
from qeval.types import Estimate

_COLUMNS = ("engine", "variant", "batch", "prompt", "prompt, ms", "token, ms", "tokens/s", "peak, MB", "runs")
_NAMES = 2
_MB = 1e6


def bench_summary_table(out: Path, record: BenchRecord) -> Table:
    """Return the median latencies of a prompt and of a generated token with their intervals, or why there are none."""
    repeats: dict[tuple[str, str, int, int], list[Timing]] = defaultdict(list)
    for timing in read_timings(out, record.timings):
        repeats[timing.engine, timing.variant, timing.batch, timing.prompt].append(timing)
    table = Table(caption="medians; brackets: 95 % intervals by order statistics; peak: of the process, generating")
    for place, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if place < _NAMES else "right", overflow="fold")
    for cell in record.cells:
        table.add_row(*_row(cell, repeats[cell.engine, cell.variant, cell.batch, cell.prompt]))
    return table


def _row(cell: CellRecord, repeats: Sequence[Timing]) -> list[str]:
    where = [cell.engine, cell.variant, str(cell.batch), str(cell.prompt)]
    if not repeats:
        return [*where, cell.outcome, "", "", "", "0"]
    steps = [sum(each.step_seconds) / len(each.step_seconds) for each in repeats if each.step_seconds]
    token = median([1e3 * step for step in steps], unit="ms", better="lower")
    rate = "" if not token.value else f"{1e3 * cell.batch / token.value:.1f}"
    peak = "" if cell.peak_generate_bytes is None else f"{cell.peak_generate_bytes / _MB:.0f}"
    prompt = median([1e3 * each.prompt_seconds for each in repeats], unit="ms", better="lower")
    return [*where, _text(prompt), _text(token), rate, peak, str(len(repeats))]


def _text(estimate: Estimate) -> str:
    if estimate.value is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.1f}"
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
