"""The results of a benchmark so far, written to disk as they come."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from qeval.identity import digest
from qeval.progress import Progress
from qeval.stats.median import half_width, median
from qeval.store.timings import (
    BenchRecord,
    CellOutcome,
    CellRecord,
    Drift,
    EngineRecord,
    Timing,
    find_timing,
    read_timings,
    write_bench_record,
    write_timing,
)

MOST_HALF_WIDTH = 0.03
"""Half of the interval of a median, as a share of it, at which a cell is measured well enough."""


class EngineCell(NamedTuple):
    """A cell of one engine with one variant."""

    engine: str
    variant: str
    batch: int
    prompt: int


@dataclass
class CellState:
    """The state of one cell."""

    repeats: list[Timing] = field(default_factory=list)
    outcome: CellOutcome = "unspent"
    reason: str | None = None

    @property
    def is_settled(self) -> bool:
        """Return whether the medians of the prompt and of a step are known to `MOST_HALF_WIDTH`."""
        prompts = [each.prompt_seconds for each in self.repeats]
        steps = [sum(each.step_seconds) for each in self.repeats if each.step_seconds]
        return _is_narrow(prompts) and (not steps or _is_narrow(steps))


class Results:
    """The records of one run; every change is on the disk when it returns."""

    def __init__(self, out: Path, record: BenchRecord, places: Iterable[EngineCell], progress: Progress) -> None:
        """Take the run's record at its beginning, and its cells."""
        self._out, self._record, self._progress = out, record, progress
        self._start = time.monotonic()
        self.states = {place: CellState() for place in places}
        self._identities: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._files: dict[EngineCell, list[str]] = {place: [] for place in self.states}
        self._opened: dict[tuple[str, str], EngineRecord] = {}
        self._drifts: list[Drift] = []
        self._order = count()

    def open(self, opened: EngineRecord, identity: Mapping[str, Any]) -> None:
        """Add an engine with a variant that is open; what earlier runs measured of it counts."""
        self._opened[opened.engine, opened.variant] = opened
        if (opened.engine, opened.variant) not in self._identities:
            self._identities[opened.engine, opened.variant] = identity
            for place in self.states:
                if (place.engine, place.variant) == (opened.engine, opened.variant):
                    self._find(place)
        self.write()

    def refuse(self, engine: str, variant: str, outcome: CellOutcome, reason: str) -> None:
        """Note why an engine with a variant has no results."""
        known = self._opened.get((engine, variant), EngineRecord(engine, variant, None))
        self._opened[engine, variant] = replace(known, reason=reason)
        for place, state in self.states.items():
            if (place.engine, place.variant) == (engine, variant):
                self._close(place, state, outcome, reason)
        self.write()

    def refuse_cell(self, place: EngineCell, outcome: CellOutcome, reason: str) -> None:
        """Note why a cell can't be measured."""
        self._close(place, self.states[place], outcome, reason)
        self.write()

    def mark_unspent(self) -> None:
        """Note that the budget ended before the cells that have no run."""
        for state in self.states.values():
            if state.outcome == "unspent":
                state.reason = "The budget ended before its first run; give a larger --time-budget."
        self.write()

    def set_compile_seconds(self, engine: str, variant: str, seconds: float) -> None:
        """Set the seconds that an engine has spent on compiling so far."""
        self._opened[engine, variant] = replace(self._opened[engine, variant], compile_seconds=seconds)

    def add_drifts(self, drifts: Iterable[Drift]) -> None:
        """Add what a check of tokens showed."""
        self._drifts.extend(drifts)
        self.write()

    def add(self, place: EngineCell, timing: Timing) -> None:
        """Add a repeat."""
        state = self.states[place]
        timing = replace(timing, repeat=len(state.repeats), order=next(self._order))
        path = write_timing(self._out, self._key(place, timing.repeat), timing)
        self._take(place, timing, path.name)
        self.write()

    def write(self, *, finished: bool = False) -> BenchRecord:
        """Write all that is known, and return the record."""
        self._record = self._record.model_copy(
            update={
                "finished": datetime.now(UTC).isoformat(timespec="seconds") if finished else None,
                "seconds": time.monotonic() - self._start,
                "opened": list(self._opened.values()),
                "cells": [_cell(place, state) for place, state in self.states.items()],
                "drifts": list(self._drifts),
                "timings": [name for names in self._files.values() for name in names],
                "warnings": list(self._progress.warnings),
            }
        )
        write_bench_record(self._out, self._record)
        return self._record

    def _find(self, place: EngineCell) -> None:
        """Take the repeats of an earlier command."""
        for repeat in count():
            path = find_timing(self._out, self._key(place, repeat), self._progress.warn)
            if path is None:
                return
            [timing] = read_timings(self._out, [path.name])
            self._take(place, timing, path.name)
            self._order = count(max(next(self._order), timing.order + 1))

    def _take(self, place: EngineCell, timing: Timing, name: str) -> None:
        state = self.states[place]
        state.repeats.append(timing)
        state.outcome, state.reason = "measured", None
        self._files[place].append(name)

    def _close(self, place: EngineCell, state: CellState, outcome: CellOutcome, reason: str) -> None:
        state.outcome, state.reason = outcome, reason
        state.repeats.clear()
        self._files[place].clear()

    def _key(self, place: EngineCell, repeat: int) -> str:
        settings = self._record.settings
        return digest(
            {
                "place": list(place),
                "repeat": repeat,
                "generate": settings.generate,
                "corpus": settings.corpus_sha256,
                "identity": dict(self._identities[place.engine, place.variant]),
                "weights": self._record.model.weights_sha256,
                "processor": self._record.environment.processor,
                "device": self._record.environment.device,
                "seed": self._record.seed,
            }
        )


def _is_narrow(seconds: list[float]) -> bool:
    width = half_width(median(seconds, unit="s", better="lower"))
    return width is not None and width <= MOST_HALF_WIDTH


def _cell(place: EngineCell, state: CellState) -> CellRecord:
    return CellRecord(
        *place,
        outcome=state.outcome,
        reason=state.reason,
        peak_prompt_bytes=_largest(each.peak_prompt_bytes for each in state.repeats),
        peak_generate_bytes=_largest(each.peak_generate_bytes for each in state.repeats),
        cache_bytes=_largest(each.cache_bytes for each in state.repeats),
    )


def _largest(sizes: Iterable[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)
