"""The runs by the clock: every cell of every engine in turn, in rounds, until its interval is narrow or time is up.

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

from qeval.bench.engine_pool import EnginePool, PooledEngine
from qeval.bench.engines.base import Tokens
from qeval.bench.messages import Time, Timed
from qeval.bench.results import EngineCell, Results
from qeval.bench.worker_handle import EngineError
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
    """The end of the budget, on the monotonic clock."""

    ends: float

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class CellGrid:
    """The work of a benchmark: the systems, the prompts [batch, prompt] of each cell in the order of their work."""

    systems: Sequence[PooledEngine]
    prompts: Mapping[tuple[int, int], Tokens]
    generate: int
    repeats: int


def run_rounds(grid: CellGrid, results: Results, pool: EnginePool, clock: Clock, seed: int, advance: Advance) -> None:
    """Time the cells that are open; those that the budget leaves without a repeat stay unspent.

    Args:
        grid: What is run.
        results: Where each repeat goes.
        pool: The engines.
        clock: When the budget ends.
        seed: Decides the order of the engines.
        advance: Called with the number of cells that need no more.
    """
    chance = random.Random(seed)
    costs: dict[EngineCell, float] = {}
    visit = _Visit(grid, results, pool, clock, costs)
    pending = {_place(system, cell) for system in grid.systems for cell in grid.prompts}
    done = [place for place in pending if _is_done(results, grid, place)]
    while pending := pending - set(done):
        advance(len(done))
        done, worked = [], False
        for system, place in _turns(grid, chance, one_by_one=pool.is_crowded):
            if place not in pending or clock.left < _expected(place, grid, costs):
                continue
            worked = True
            visit(system, place)
            if _is_done(results, grid, place):
                done.append(place)
        if not worked:
            break
    advance(len(pending))


def _turns(grid: CellGrid, chance: random.Random, *, one_by_one: bool) -> Iterator[tuple[PooledEngine, EngineCell]]:
    """Yield a round: each cell's systems in a random order, or with `one_by_one` each system's cells."""
    shuffled = partial(chance.sample, list(grid.systems), len(grid.systems))
    if one_by_one:
        yield from ((system, _place(system, cell)) for system in shuffled() for cell in grid.prompts)
    else:
        yield from ((system, _place(system, cell)) for cell in grid.prompts for system in shuffled())


@dataclass(frozen=True)
class _Visit:
    """One run of a system in a cell, after its warm-up if that is due."""

    grid: CellGrid
    results: Results
    pool: EnginePool
    clock: Clock
    costs: dict[EngineCell, float]

    def __call__(self, system: PooledEngine, place: EngineCell) -> None:
        prompts = self.grid.prompts[place.batch, place.prompt]
        try:
            if not self.pool.is_warm(system, place.batch, place.prompt):
                self._warm(system, prompts)
                self.pool.mark_warm(system, place.batch, place.prompt)
            start = time.monotonic()
            timed = self._timed(system, prompts)
            self.costs[place] = time.monotonic() - start
            self.results.add(place, _timing(place, timed))
        except EngineError as trouble:
            self.results.refuse_cell(place, trouble.trouble, trouble.reason)

    def _warm(self, system: PooledEngine, prompts: Tokens) -> None:
        length = max(1, min(prompts.shape[1], _WARM_TOKENS // len(prompts)))
        self._run(system, prompts[:, :length], min(self.grid.generate, _WARM_STEPS))

    def _timed(self, system: PooledEngine, prompts: Tokens) -> Timed:
        """Return a run in which nothing was compiled.

        Raises:
            EngineError: There was none.
        """
        for _ in range(_COMPILED_RUNS):
            timed = self._run(system, prompts, self.grid.generate)
            if not timed.compiled_seconds:
                return timed
        raise EngineError("failed", f"Something was compiled in each of {_COMPILED_RUNS} runs of the same shape.")

    def _run(self, system: PooledEngine, prompts: Tokens, generate: int) -> Timed:
        patience = max(self.clock.left, 0.0) + _GRACE_SECONDS
        timed = self.pool.ask(system, Time(prompts, generate), Timed, patience)
        if timed.all_compiled_seconds:
            self.results.set_compile_seconds(*system.name, timed.all_compiled_seconds)
        return timed


def _is_done(results: Results, grid: CellGrid, place: EngineCell) -> bool:
    state = results.states[place]
    closed = state.outcome not in ("measured", "unspent")
    return closed or state.is_settled or len(state.repeats) >= grid.repeats


def _expected(place: EngineCell, grid: CellGrid, costs: Mapping[EngineCell, float]) -> float:
    """Return the seconds that a visit takes: its last run's, else the system's dearest cell's, by work."""
    if place in costs:
        return costs[place]
    same_system = [other for other in costs if (other.engine, other.variant) == (place.engine, place.variant)]
    if not same_system:
        return 0.0
    dearest = max(same_system, key=costs.__getitem__)
    return costs[dearest] * _work(place, grid) / _work(dearest, grid)


def _work(place: EngineCell, grid: CellGrid) -> int:
    return place.batch * (place.prompt + grid.generate)


def _place(system: PooledEngine, cell: tuple[int, int]) -> EngineCell:
    return EngineCell(*system.name, *cell)


def _timing(place: EngineCell, timed: Timed) -> Timing:
    return Timing(
        *place,
        repeat=0,  # the results set it, as they do the order
        order=0,
        prompt_seconds=timed.prompt_seconds,
        step_seconds=timed.step_seconds,
        energy_joules=timed.energy_joules,
        peak_prompt_bytes=timed.peak_prompt_bytes,
        peak_generate_bytes=timed.peak_generate_bytes,
        cache_bytes=timed.cache_bytes,
    )
