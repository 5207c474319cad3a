"""All that a benchmark's page says, measured: rows by cell, each against a chosen base, memory and correctness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qeval.errors import UsageError, unknown
from qeval.report.bench.correct import Correctness, correctness
from qeval.report.bench.rows import Row, System, rows, times
from qeval.report.model import Metric
from qeval.store.timings import BenchRecord, Opened, Timing

FULL = ("fp16", "bf16", "fp32")
"""Variants that aren't quantized, the first that an engine has being its base."""


@dataclass(frozen=True)
class Saving:
    """A quantized system in one cell against its engine's own base, or the run's where that engine has none.

    Ratios above 1 are gains; None where one side was not measured. Peaks of memory are read once a cell, so their
    ratio has no interval.
    """

    row: Row
    base: System
    memory: float | None
    speed_up: Metric | None


@dataclass(frozen=True)
class Summary:
    """What tables, plots and files are made of; `base` is what 'x times' refers to."""

    record: BenchRecord
    base: System | None
    rows: Sequence[Row]
    savings: Sequence[Saving]
    correct: Mapping[System, Correctness]

    @property
    def shown(self) -> list[Row]:
        """The measured rows whose speed may be told: those of models whose tokens are not known to be wrong."""
        return [row for row in self.rows if row.figures and not self.broken(row.system)]

    @property
    def told(self) -> list[Row]:
        """The rows of systems that could run; of the others their reason says all."""
        failed = {system for system, each in self.opened.items() if each.reason is not None}
        return [row for row in self.rows if row.figures or row.system not in failed]

    @property
    def opened(self) -> dict[System, Opened]:
        """By system."""
        return {System(each.engine, each.variant): each for each in self.record.opened}

    def broken(self, system: System) -> bool:
        """Whether a system's tokens were checked and are not the reference's."""
        return system in self.correct and self.correct[system].broken

    def against_base(self, row: Row, latency: str) -> Metric | None:
        """How many times as fast as the base a row is in its own cell."""
        other = next((each for each in self.shown if (each.system, each.place) == (self.base, row.place)), None)
        return None if other is None else times(row, other, latency, self.record.seed)


def summarize(record: BenchRecord, timings: Sequence[Timing], base: str | None = None) -> Summary:
    """Measure all cells; `base` is an engine's name, or `ENGINE/VARIANT`; None: the first engine that has one.

    Raises:
        UsageError: no such engine or variant was measured.
        BrokenRecordError: the records of one cell contradict one another.
    """
    found, correct = rows(record.cells, timings), correctness(record.drifts, record.seed)
    measured = [row for row in found if row.figures and not (row.system in correct and correct[row.system].broken)]
    chosen = _base([row.system for row in measured], base)
    savings = [made for row in measured if (made := _saving(row, measured, chosen, record.seed)) is not None]
    return Summary(record, chosen, found, savings, correct)


def _base(systems: Sequence[System], asked: str | None) -> System | None:
    """The run's base: what was asked for, else the first of `FULL` that any engine has, in the engines' order."""
    if asked is None:
        return _first_full(systems)
    engine, _, variant = asked.partition("/")
    own = [system for system in systems if system.engine == engine]
    if not own:
        raise unknown("engine for a base, among those measured,", engine, {system.engine for system in systems})
    if variant:
        if System(engine, variant) not in own:
            raise unknown(f"variant of {engine} for a base", variant, {system.variant for system in own})
        return System(engine, variant)
    found = _first_full(own)
    if found is None:
        raise UsageError(
            f"{engine} has no variant to be the base ({', '.join(FULL)}); name one: --base {engine}/{own[0].variant}."
        )
    return found


def _first_full(systems: Sequence[System]) -> System | None:
    return next((system for kind in FULL for system in systems if system.variant == kind), None)


def _saving(row: Row, measured: Sequence[Row], base: System | None, seed: int) -> Saving | None:
    """None where the row is a base itself, or there is nothing to compare it with."""
    own = _first_full([each.system for each in measured if each.system.engine == row.system.engine]) or base
    if own is None or row.system == own or row.system.variant in FULL:
        return None
    other = next((each for each in measured if (each.system, each.place) == (own, row.place)), None)
    if other is None:
        return None
    ours, theirs = row.cell.peak_generate_bytes, other.cell.peak_generate_bytes
    return Saving(row, own, theirs / ours if ours and theirs else None, times(row, other, "whole", seed))
