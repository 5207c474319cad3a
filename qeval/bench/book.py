"""What the job has found so far, written down as it is found."""

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
    Cell,
    Drift,
    Opened,
    Outcome,
    Timing,
    find_timing,
    read_timings,
    write_bench,
    write_timing,
)

MOST_HALF_WIDTH = 0.03
"""Half of the interval of a median, as a share of it, at which a cell is measured well enough."""


class Place(NamedTuple):
    """A cell of one engine with one variant."""

    engine: str
    variant: str
    batch: int
    prompt: int


@dataclass
class Page:
    """What is known of one place."""

    repeats: list[Timing] = field(default_factory=list)
    outcome: Outcome = "unspent"
    reason: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the medians of the prompt and of a step are known to `MOST_HALF_WIDTH`."""
        prompts = [each.prompt_seconds for each in self.repeats]
        steps = [sum(each.step_seconds) for each in self.repeats if each.step_seconds]
        return _is_narrow(prompts) and (not steps or _is_narrow(steps))


class Book:
    """The records of one run; every change is on the disk when it returns."""

    def __init__(self, out: Path, record: BenchRecord, places: Iterable[Place], progress: Progress) -> None:
        """`record` is the run at its beginning."""
        self._out, self._record, self._progress = out, record, progress
        self._start = time.monotonic()
        self.pages = {place: Page() for place in places}
        self._identities: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._files: dict[Place, list[str]] = {place: [] for place in self.pages}
        self._opened: dict[tuple[str, str], Opened] = {}
        self._drifts: list[Drift] = []
        self._order = count()

    def open(self, opened: Opened, identity: Mapping[str, Any]) -> None:
        """An engine with a variant is open; what earlier runs measured of it counts."""
        self._opened[opened.engine, opened.variant] = opened
        if (opened.engine, opened.variant) not in self._identities:
            self._identities[opened.engine, opened.variant] = identity
            for place in self.pages:
                if (place.engine, place.variant) == (opened.engine, opened.variant):
                    self._find(place)
        self.write()

    def refuse(self, engine: str, variant: str, outcome: Outcome, reason: str) -> None:
        """Nothing of an engine with a variant is to be told but why."""
        known = self._opened.get((engine, variant), Opened(engine, variant, None))
        self._opened[engine, variant] = replace(known, reason=reason)
        for place, page in self.pages.items():
            if (place.engine, place.variant) == (engine, variant):
                self._close(place, page, outcome, reason)
        self.write()

    def refuse_cell(self, place: Place, outcome: Outcome, reason: str) -> None:
        """A cell can't be measured."""
        self._close(place, self.pages[place], outcome, reason)
        self.write()

    def say_unspent(self) -> None:
        """What the budget left without a run says so."""
        for page in self.pages.values():
            if page.outcome == "unspent":
                page.reason = "The budget ended before its first run; give a larger --time-budget."
        self.write()

    def compiled(self, engine: str, variant: str, seconds: float) -> None:
        """What compiling came to so far."""
        self._opened[engine, variant] = replace(self._opened[engine, variant], compile_seconds=seconds)

    def drifted(self, drifts: Iterable[Drift]) -> None:
        """Tokens were checked."""
        self._drifts.extend(drifts)
        self.write()

    def add(self, place: Place, timing: Timing) -> None:
        """A repeat is done."""
        page = self.pages[place]
        timing = replace(timing, repeat=len(page.repeats), order=next(self._order))
        path = write_timing(self._out, self._key(place, timing.repeat), timing)
        self._take(place, timing, path.name)
        self.write()

    def write(self, *, finished: bool = False) -> BenchRecord:
        """Write all that is known; the record."""
        self._record = self._record.model_copy(
            update={
                "finished": datetime.now(UTC).isoformat(timespec="seconds") if finished else None,
                "seconds": time.monotonic() - self._start,
                "opened": list(self._opened.values()),
                "cells": [_cell(place, page) for place, page in self.pages.items()],
                "drifts": list(self._drifts),
                "timings": [name for names in self._files.values() for name in names],
                "warnings": list(self._progress.warnings),
            }
        )
        write_bench(self._out, self._record)
        return self._record

    def _find(self, place: Place) -> None:
        """The repeats of an earlier command."""
        for repeat in count():
            path = find_timing(self._out, self._key(place, repeat), self._progress.warn)
            if path is None:
                return
            [timing] = read_timings(self._out, [path.name])
            self._take(place, timing, path.name)
            self._order = count(max(next(self._order), timing.order + 1))

    def _take(self, place: Place, timing: Timing, name: str) -> None:
        page = self.pages[place]
        page.repeats.append(timing)
        page.outcome, page.reason = "measured", None
        self._files[place].append(name)

    def _close(self, place: Place, page: Page, outcome: Outcome, reason: str) -> None:
        page.outcome, page.reason = outcome, reason
        page.repeats.clear()
        self._files[place].clear()

    def _key(self, place: Place, repeat: int) -> str:
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


def _cell(place: Place, page: Page) -> Cell:
    return Cell(
        *place,
        outcome=page.outcome,
        reason=page.reason,
        peak_prompt_bytes=_largest(each.peak_prompt_bytes for each in page.repeats),
        peak_generate_bytes=_largest(each.peak_generate_bytes for each in page.repeats),
        cache_bytes=_largest(each.cache_bytes for each in page.repeats),
    )


def _largest(sizes: Iterable[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)
