"""A benchmark's figures, cell by cell: medians of the repeats with their intervals, ratios of two medians."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qeval.errors import BrokenRecordError
from qeval.report.model import Metric, Metrics
from qeval.stats.bootstrap import Floats
from qeval.stats.median import median, median_ratio
from qeval.store.timings import CellRecord, Timing


class System(NamedTuple):
    """An engine with a variant."""

    engine: str
    variant: str

    def __str__(self) -> str:
        """Return its name in plots."""
        return f"{self.engine} {self.variant}"


@dataclass(frozen=True)
class MeasuredRow:
    """A cell: what became of it and, where it was measured, its figures.

    `figures` holds medians over repeats under the names of `FIGURES`, fewer where too few tokens were generated;
    `seconds` each repeat's own latencies [repeats], from which ratios of two cells are made.
    """

    cell: CellRecord
    generated: int
    repeats: int
    figures: Metrics
    seconds: Mapping[str, Floats]

    @property
    def system(self) -> System:
        """The engine with the variant."""
        return System(self.cell.engine, self.cell.variant)

    @property
    def place(self) -> tuple[int, int]:
        """Batch and prompt length."""
        return self.cell.batch, self.cell.prompt


FIGURES = {
    "prompt_ms": ("prompt", 1e3),
    "prompt_tps": ("prompt", None),
    "half_ms": ("half", 1e3),
    "half_tps": ("half", None),
    "whole_ms": ("whole", 1e3),
    "whole_tps": ("whole", None),
    "wall_s": ("wall", 1.0),
    "wall_tps": ("wall", None),
}
"""Figure: the latency that it is made of, and what a second of it counts; None: a throughput in tokens a second."""


def rows(cells: Sequence[CellRecord], timings: Sequence[Timing]) -> list[MeasuredRow]:
    """Return one row a cell, in the order of the records.

    Raises:
        BrokenRecordError: repeats of one cell generated different numbers of tokens, or a measured cell has none.
    """
    repeats: dict[tuple[System, int, int], list[Timing]] = defaultdict(list)
    for timing in timings:
        repeats[System(timing.engine, timing.variant), timing.batch, timing.prompt].append(timing)
    return [_row(cell, repeats[System(cell.engine, cell.variant), cell.batch, cell.prompt]) for cell in cells]


def times(row: MeasuredRow, base: MeasuredRow, latency: str, seed: int) -> Metric | None:
    """Return how many times as fast as `base` a row is, by medians of a latency; None where one lacks it."""
    if latency not in row.seconds or latency not in base.seconds:
        return None
    return Metric.of(median_ratio(base.seconds[latency], row.seconds[latency], better="higher", seed=seed))


def _row(cell: CellRecord, timings: Sequence[Timing]) -> MeasuredRow:
    if cell.outcome != "measured":
        return MeasuredRow(cell, 0, 0, {}, {})
    counts = {len(timing.step_seconds) + 1 for timing in timings}
    if len(counts) != 1:
        raise BrokenRecordError(
            f"The cell {cell.engine} {cell.variant}, batch {cell.batch}, prompt {cell.prompt} has "
            f"{len(timings)} repeats of {sorted(counts)} generated tokens; run the same command again."
        )
    generated = counts.pop()
    seconds = _seconds(timings, generated)
    figures = {name: metric for name in FIGURES if (metric := _figure(name, seconds, cell, generated)) is not None}
    joules = [timing.energy_joules for timing in timings]
    if joules and all(joule is not None for joule in joules):
        figures["energy_joules"] = Metric.of(median(np.asarray(joules), unit="J", better="lower"))
    return MeasuredRow(cell, generated, len(timings), figures, seconds)


def _seconds(timings: Sequence[Timing], generated: int) -> dict[str, Floats]:
    """Return latencies by repeat: the prompt, the mean step of the first half and of all tokens, all together.

    The first token comes with the prompt, so the first n generated tokens take n - 1 steps.
    """
    steps = np.asarray([timing.step_seconds for timing in timings], np.float64)
    prompt = np.asarray([timing.prompt_seconds for timing in timings], np.float64)
    seconds: dict[str, Floats] = {"prompt": prompt, "wall": prompt + steps.sum(axis=1)}
    for name, tokens in (("half", generated // 2), ("whole", generated)):
        if tokens >= 2:
            seconds[name] = steps[:, : tokens - 1].mean(axis=1)
    return seconds


def _figure(name: str, seconds: Mapping[str, Floats], cell: CellRecord, generated: int) -> Metric | None:
    latency, scale = FIGURES[name]
    if latency not in seconds:
        return None
    if scale is not None:
        unit = "s" if scale == 1.0 else "ms"
        return Metric.of(median(scale * seconds[latency], unit=unit, better="lower"))
    tokens = {"prompt": cell.prompt, "half": 1, "whole": 1, "wall": cell.prompt + generated}[latency]
    return _rate(Metric.of(median(seconds[latency], unit="s", better="lower")), cell.batch * tokens)


def _rate(latency: Metric, tokens: int) -> Metric:
    """Return tokens a second from the seconds they take: the reciprocal, whose interval has its ends exchanged."""
    value, low, high = (tokens / each if each else None for each in (latency.value, latency.high, latency.low))
    return latency.model_copy(
        update={"value": value, "low": low, "high": high, "unit": "tokens/s", "better": "higher"},
    )
