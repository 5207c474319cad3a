"""All that a benchmark's page says, measured: rows by cell, each against a chosen base, memory and correctness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qeval.errors import UsageError, unknown
from qeval.report.bench.correct import Correctness, correctness
from qeval.report.bench.rows import MeasuredRow, System, rows, times
from qeval.report.model import Metric
from qeval.store.timings import BenchRecord, EngineRecord, Timing

FULL = ("fp16", "bf16", "fp32")
"""Variants that aren't quantized, the first that an engine has being its base."""


@dataclass(frozen=True)
class Saving:
    """A quantized system in one cell against its engine's own base, or the run's where that engine has none.

    Ratios above 1 are gains; None where one side was not measured. Peaks of memory are read once a cell, so their
    ratio has no interval.
    """

    row: MeasuredRow
    base: System
    memory: float | None
    speed_up: Metric | None


@dataclass(frozen=True)
class Summary:
    """The figures that tables, plots and files are made of; `base` is what 'x times' refers to.

    `missing_base` was asked for as that, and nothing of it was measured.
    """

    record: BenchRecord
    base: System | None
    missing_base: str | None
    rows: Sequence[MeasuredRow]
    savings: Sequence[Saving]
    correct: Mapping[System, Correctness]

    @property
    def shown(self) -> list[MeasuredRow]:
        """The measured rows whose speed may be shown: those of models whose tokens are not known to be wrong."""
        return [row for row in self.rows if row.figures and not self.broken(row.system)]

    @property
    def runnable(self) -> list[MeasuredRow]:
        """The rows of systems that could run; of the others their reason says all."""
        failed = {system for system, each in self.opened.items() if each.reason is not None}
        return [row for row in self.rows if row.figures or row.system not in failed]

    @property
    def opened(self) -> dict[System, EngineRecord]:
        """By system."""
        return {System(each.engine, each.variant): each for each in self.record.opened}

    def broken(self, system: System) -> bool:
        """Return whether a system's tokens were checked and are not the reference's."""
        return system in self.correct and self.correct[system].broken

    def against_base(self, row: MeasuredRow, latency: str) -> Metric | None:
        """Return how many times as fast as the base a row is in its own cell."""
        other = next((each for each in self.shown if (each.system, each.place) == (self.base, row.place)), None)
        return None if other is None else times(row, other, latency, self.record.seed)


def summarize(record: BenchRecord, timings: Sequence[Timing], base: str | None = None) -> Summary:
    """Measure all cells; `base` is an engine's name, or `ENGINE/VARIANT`; None: the first engine that has one.

    Raises:
        UsageError: as `check_base`.
        BrokenRecordError: the records of one cell contradict one another.
    """
    engines, variants = ([getattr(cell, name) for cell in record.cells] for name in ("engine", "variant"))
    check_base(base, list(dict.fromkeys(engines)), list(dict.fromkeys(variants)))
    all_rows, correct = rows(record.cells, timings), correctness(record.drifts, record.seed)
    measured = [row for row in all_rows if row.figures and not (row.system in correct and correct[row.system].broken)]
    chosen = _base([row.system for row in measured], base)
    savings = [saving for row in measured if (saving := _saving(row, measured, chosen, record.seed)) is not None]
    return Summary(record, chosen, base if chosen is None else None, all_rows, savings, correct)


def check_base(base: str | None, engines: Sequence[str], variants: Sequence[str]) -> None:
    """Refuse a base that a benchmark of these engines and variants can't have.

    Raises:
        UsageError: the engine or the variant is not among them, or no variant is unquantized and none is named.
    """
    if base is None:
        return
    engine, _, variant = base.partition("/")
    if engine not in engines:
        raise unknown("engine in --base", engine, engines)
    if variant and variant not in variants:
        raise unknown("variant in --base", variant, variants)
    if not variant and not set(FULL) & set(variants):
        raise UsageError(
            f"--base {engine}: none of the variants is unquantized ({', '.join(FULL)}); add one to --methods, or name "
            f"another: --base {engine}/{variants[0]}."
        )


def _base(systems: Sequence[System], base: str | None) -> System | None:
    """Return the run's base: what was asked for, else the first of `FULL` that any engine has, in the engines' order.

    None where that was not measured.
    """
    if base is None:
        return _first_full(systems)
    engine, _, variant = base.partition("/")
    candidates = [system for system in systems if system.engine == engine and variant in ("", system.variant)]
    return candidates[0] if variant and candidates else _first_full(candidates)


def _first_full(systems: Sequence[System]) -> System | None:
    return next((system for kind in FULL for system in systems if system.variant == kind), None)


def _saving(row: MeasuredRow, measured: Sequence[MeasuredRow], base: System | None, seed: int) -> Saving | None:
    """Return what a row saves; None where it is a base itself, or there is nothing to compare it with."""
    unquantized = _first_full([each.system for each in measured if each.system.engine == row.system.engine]) or base
    if unquantized is None or row.system == unquantized or row.system.variant in FULL:
        return None
    other = next((each for each in measured if (each.system, each.place) == (unquantized, row.place)), None)
    if other is None:
        return None
    size, base_size = row.cell.peak_generate_bytes, other.cell.peak_generate_bytes
    return Saving(row, unquantized, base_size / size if size and base_size else None, times(row, other, "whole", seed))
