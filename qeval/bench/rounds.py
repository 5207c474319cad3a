"""The runs by the clock: every cell of every engine in turn, round after round, until it is known well or time is up.

In each round the cells come in the order of their work, and for each of them the engines in a random order, one run
each: what a drifting machine does to one engine it does to the others. A cell that has its interval drops out. An
engine's first run of a shape in its process is a warm-up, of at most `_WARM_TOKENS` of the prompt and a few generated
tokens; a run in which something was compiled is one too.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from qeval.bench.book import Book, Place
from qeval.bench.fleet import Fleet, System
from qeval.bench.process import TroubleError
from qeval.bench.words import Time, Timed
from qeval.engines.base import Tokens
from qeval.progress import Advance
from qeval.store.timings import Timing

_WARM_TOKENS, _WARM_STEPS = 1024, 3
"""Beyond so many tokens a run lasts for seconds, of which what happens once is a small part."""
_COMPILED_RUNS = 3
"""Runs of one visit that may turn out to have compiled something."""
_GRACE_SECONDS = 120.0
"""How much longer than the whole budget one answer may take before its engine counts as hung."""


@dataclass(frozen=True)
class Clock:
    """When the budget ends, on the monotonic clock."""

    ends: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Grid:
    """What is to be run: the systems, the prompts [batch, prompt] of each cell in the order of their work."""

    systems: Sequence[System]
    prompts: Mapping[tuple[int, int], Tokens]
    generate: int
    repeats: int


def run_rounds(grid: Grid, book: Book, fleet: Fleet, clock: Clock, seed: int, advance: Advance) -> None:
    """Fill the book's open pages; those that the budget leaves without a repeat stay unspent.

    `advance` is told 1 for every cell that needs no more.
    """
    chance = random.Random(seed)
    costs: dict[Place, float] = {}
    visit = _Visit(grid, book, fleet, clock, costs)
    pending = {_place(system, cell) for system in grid.systems for cell in grid.prompts}
    done = [place for place in pending if _is_done(book, grid, place)]
    while pending := pending - set(done):
        advance(len(done))
        done, worked = [], False
        for system, place in _turns(grid, chance, one_by_one=fleet.is_crowded):
            if place not in pending or clock.left < _expected(place, grid, costs):
                continue
            worked = True
            visit(system, place)
            if _is_done(book, grid, place):
                done.append(place)
        if not worked:
            break
    advance(len(pending))


def _turns(grid: Grid, chance: random.Random, *, one_by_one: bool) -> Iterator[tuple[System, Place]]:
    """A round: each cell's systems in a random order; `one_by_one` each system's cells, where memory holds but one."""
    shuffled = partial(chance.sample, list(grid.systems), len(grid.systems))
    if one_by_one:
        yield from ((system, _place(system, cell)) for system in shuffled() for cell in grid.prompts)
    else:
        yield from ((system, _place(system, cell)) for cell in grid.prompts for system in shuffled())


@dataclass(frozen=True)
class _Visit:
    """One run of a system in a cell, after its warm-up if that is due."""

    grid: Grid
    book: Book
    fleet: Fleet
    clock: Clock
    costs: dict[Place, float]

    def __call__(self, system: System, place: Place) -> None:
        prompts = self.grid.prompts[place.batch, place.prompt]
        try:
            if not self.fleet.is_warm(system, place.batch, place.prompt):
                self._warm(system, prompts)
                self.fleet.warmed(system, place.batch, place.prompt)
            start = time.monotonic()
            timed = self._timed(system, prompts)
            self.costs[place] = time.monotonic() - start
            self.book.add(place, _timing(place, timed))
        except TroubleError as trouble:
            self.book.refuse_cell(place, trouble.trouble, trouble.reason)

    def _warm(self, system: System, prompts: Tokens) -> None:
        length = max(1, min(prompts.shape[1], _WARM_TOKENS // len(prompts)))
        self._run(system, prompts[:, :length], min(self.grid.generate, _WARM_STEPS))

    def _timed(self, system: System, prompts: Tokens) -> Timed:
        """A run in which nothing was compiled.

        Raises:
            TroubleError: there was none.
        """
        for _ in range(_COMPILED_RUNS):
            timed = self._run(system, prompts, self.grid.generate)
            if not timed.compiled_seconds:
                return timed
        raise TroubleError("failed", f"Something was compiled in each of {_COMPILED_RUNS} runs of the same shape.")

    def _run(self, system: System, prompts: Tokens, generate: int) -> Timed:
        patience = max(self.clock.left, 0.0) + _GRACE_SECONDS
        timed = self.fleet.ask(system, Time(prompts, generate), Timed, patience)
        if timed.all_compiled_seconds:
            self.book.compiled(*system.name, timed.all_compiled_seconds)
        return timed


def _is_done(book: Book, grid: Grid, place: Place) -> bool:
    page = book.pages[place]
    closed = page.outcome not in ("measured", "unspent")
    return closed or page.is_settled or len(page.repeats) >= grid.repeats


def _expected(place: Place, grid: Grid, costs: Mapping[Place, float]) -> float:
    """Seconds that a visit takes: its last run's; before the first those of the system's dearest cell, by work."""
    if place in costs:
        return costs[place]
    own = [other for other in costs if (other.engine, other.variant) == (place.engine, place.variant)]
    if not own:
        return 0.0
    dearest = max(own, key=costs.__getitem__)
    return costs[dearest] * _work(place, grid) / _work(dearest, grid)


def _work(place: Place, grid: Grid) -> int:
    return place.batch * (place.prompt + grid.generate)


def _place(system: System, cell: tuple[int, int]) -> Place:
    return Place(*system.name, *cell)


def _timing(place: Place, timed: Timed) -> Timing:
    return Timing(
        *place,
        repeat=0,  # the book's to say, as is the order
        order=0,
        prompt_seconds=timed.prompt_seconds,
        step_seconds=timed.step_seconds,
        energy_joules=timed.energy_joules,
        peak_prompt_bytes=timed.peak_prompt_bytes,
        peak_generate_bytes=timed.peak_generate_bytes,
        cache_bytes=timed.cache_bytes,
    )
