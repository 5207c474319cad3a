"""What a benchmark is asked for, its prompts, and how it spends its budget."""

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qeval.bench import rounds
from qeval.bench.engine_pool import PooledEngine
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.registry import ENGINES, maker
from qeval.bench.messages import Timed
from qeval.bench.prompts import passages
from qeval.bench.results import CellState, EngineCell, Results
from qeval.bench.rounds import CellGrid, Clock, run_rounds
from qeval.bench.settings import BenchChoice, parse_numbers, parse_variants
from qeval.bench.worker_handle import EngineError
from qeval.compare.settings import ModelChoice
from qeval.config import Defaults
from qeval.errors import UsageError
from qeval.models.source import ModelSource
from qeval.progress import Silent
from qeval.store.timings import EngineRecord, Timing, read_bench_record, read_timings
from tests.fixtures.benchrun import bench_record

FOREVER = 1e9


def choice(**changes):
    given = {
        "model": ModelChoice("m"),
        "engines": ("replay",),
        "precisions": ("fp32",),
        "recipes": (),
        "variants": (),
        "batches": (1, 4),
        "prompts": (16, 64),
        "generate": 8,
        "out": Path("nowhere"),
    }
    return BenchChoice(**given | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engines": ("onnxruntim",)}, "Unknown engine 'onnxruntim'; nearest: onnxruntime"),
        ({"engines": ()}, "Unknown engine ''"),
        ({"generate": 0}, "--generate must be at least 1, not 0."),
        ({"batches": (0, 1)}, "--batch must be at least 1, not 0."),
        ({"prompts": ()}, "--prompt names no number."),
        ({"budget_seconds": 0.5}, "--time-budget must be at least 1, not 0.5."),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"accuracy_level": 2}, "--accuracy-level takes 1"),
        ({"precisions": ()}, "Nothing to run"),
        ({"variants": (("fp32", Path("x")),)}, "Two variants are named 'fp32'"),
        ({"out": Path(__file__)}, "is a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_door(changes, says):
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        choice(**changes)


def test_cells_come_in_the_order_of_their_work():
    assert choice().cells == [(1, 16), (1, 64), (4, 16), (4, 64)]


def test_types_stand_beside_recipes():
    precisions, recipes = parse_variants("rtn, fp16,awq:g32,fp32", Defaults())
    assert precisions == ("fp32", "fp16")
    assert [recipe.name for recipe in recipes] == ["rtn", "awq:g32"]
    with pytest.raises(UsageError, match="--batch takes whole numbers"):
        parse_numbers("1,two", "--batch")


def test_the_engines_names_are_frozen_and_one_that_is_missing_says_what_installs_it(monkeypatch):
    names = ["onnxruntime", "onnxruntime-genai", "pytorch-eager", "pytorch-compile", "llama.cpp", "replay"]
    assert list(ENGINES) == names
    missing = replace(ENGINES["replay"], needs=("no_such_module",))
    monkeypatch.setattr("qeval.bench.engines.registry.ENGINES", {"replay": missing})
    with pytest.raises(UsageError, match="needs no_such_module, not installed here: pip install"):
        maker("replay")


@pytest.mark.parametrize(("batch", "length"), [(1, 50), (4, 10), (3, 48)])
def test_each_sequence_is_another_passage_of_the_text(batch, length):
    ids = list(range(100, 150))
    found = passages(ids, batch, length)
    assert found.shape == (batch, length)
    assert len(set(found[:, 0].tolist())) == batch
    for row in found.tolist():
        assert row == list(range(row[0], row[0] + length))


def test_a_text_too_short_for_its_prompts_is_refused():
    with pytest.raises(UsageError, match="holds 50 tokens, too few for 3 different prompts of 49"):
        passages(range(50), 3, 49)
    assert passages(range(50), 1, 51, bos=7).shape == (1, 51)


class FakePool:
    """Answers with the times that a formula gives, and counts who was asked."""

    def __init__(self, spread=0.0, trouble=None, compiles=0):
        self.spread, self.trouble, self.compiles = spread, trouble or {}, compiles
        self.asked, self.warm, self.is_crowded = [], set(), False
        self.chance = random.Random(1)

    def ask(self, system, what, kind, seconds=None):
        assert kind is Timed
        self.asked.append((system.engine, what.prompts.shape, what.generate))
        if (system.engine, what.prompts.shape) in self.trouble:
            raise EngineError(*self.trouble[system.engine, what.prompts.shape])
        self.compiles -= 1
        noise = 1 + self.spread * self.chance.uniform(-1, 1)
        steps = (0.01 * noise,) * (what.generate - 1)
        return Timed(0.1 * noise, steps, 5, 6, 7, None, float(self.compiles >= 0), 9.0)

    def is_warm(self, system, batch, prompt):
        return (system.name, batch, prompt) in self.warm

    def mark_warm(self, system, batch, prompt):
        self.warm.add((system.name, batch, prompt))


def system(engine):
    return PooledEngine(engine, "fp32", EngineSpec(ModelSource("none", "folder"), None), Path())


class Bench:
    """Two engines, two cells, and their results in a folder."""

    def __init__(self, out, cells=((1, 4), (2, 4)), repeats=30):
        self.out = out
        self.systems = [system("a"), system("b")]
        self.grid = CellGrid(self.systems, {cell: np.ones(cell, np.int64) for cell in cells}, 5, repeats)
        places = [EngineCell(each.engine, "fp32", *cell) for each in self.systems for cell in cells]
        self.results = Results(out, bench_record(), places, Silent())
        for each in self.systems:
            self.results.open(EngineRecord(*each.name, None), {"engine": each.engine})

    def run(self, pool, seconds=FOREVER, seed=0):
        run_rounds(self.grid, self.results, pool, Clock(time.monotonic() + seconds), seed, lambda done: None)
        self.results.mark_unspent()
        return self.results.write(finished=True)


def test_cells_are_repeated_until_their_intervals_are_narrow(tmp_path):
    pool, bench = FakePool(spread=0.01), Bench(tmp_path)
    record = bench.run(pool)
    assert {len(state.repeats) for state in bench.results.states.values()} == {6}  # the least that has an interval
    assert all(cell.outcome == "measured" and cell.peak_generate_bytes == 6 for cell in record.cells)
    assert record.finished
    noisy = Bench(tmp_path / "noisy", repeats=9)
    noisy.run(FakePool(spread=0.5))
    assert {len(state.repeats) for state in noisy.results.states.values()} == {9}


def test_engines_take_turns_in_a_random_order_within_each_cell(tmp_path):
    pool, bench = FakePool(), Bench(tmp_path, cells=((1, 4),))
    bench.run(pool)
    runs = [engine for engine, _, generate in pool.asked if generate == 5]
    assert all(set(runs[place : place + 2]) == {"a", "b"} for place in range(0, len(runs), 2))
    assert len({tuple(runs[place : place + 2]) for place in range(0, len(runs), 2)}) == 2
    again = FakePool()
    Bench(tmp_path / "again", cells=((1, 4),)).run(again)
    assert again.asked == pool.asked
    other = FakePool()
    Bench(tmp_path / "other", cells=((1, 4),)).run(other, seed=3)
    assert other.asked != pool.asked


def test_one_engine_after_the_other_where_memory_holds_but_one(tmp_path):
    pool, bench = FakePool(), Bench(tmp_path)
    pool.is_crowded = True
    bench.run(pool)
    first = [engine for engine, *_ in pool.asked][:8]
    assert first == sorted(first) or first == sorted(first, reverse=True)


def test_the_first_run_of_a_shape_is_a_warm_up_of_that_batch(tmp_path):
    pool, bench = FakePool(), Bench(tmp_path, cells=((4, 2000),))
    bench.run(pool)
    warm = next((shape, generate) for engine, shape, generate in pool.asked if engine == "a")
    assert warm == ((4, 256), 3)
    assert sum(shape == (4, 256) for _, shape, _ in pool.asked) == 2


def test_a_run_that_compiled_is_no_repeat(tmp_path):
    pool, bench = FakePool(compiles=2), Bench(tmp_path, cells=((1, 4),))
    record = bench.run(pool)
    assert len(pool.asked) == 2 + 1 + 2 * 6
    assert 9.0 in [opened.compile_seconds for opened in record.opened]


def test_what_fails_is_a_row_with_its_reason_and_the_rest_goes_on(tmp_path):
    trouble = {("a", (2, 4)): ("oom", "Out of memory."), ("b", (1, 4)): ("failed", "It died.")}
    bench = Bench(tmp_path)
    record = bench.run(FakePool(trouble=trouble))
    told = {(cell.engine, cell.batch): (cell.outcome, cell.reason) for cell in record.cells}
    assert told == {
        ("a", 1): ("measured", None),
        ("a", 2): ("oom", "Out of memory."),
        ("b", 1): ("failed", "It died."),
        ("b", 2): ("measured", None),
    }


def test_what_the_budget_leaves_out_is_said(tmp_path):
    record = Bench(tmp_path).run(FakePool(), seconds=-1)
    assert {cell.outcome for cell in record.cells} == {"unspent"}
    assert all("--time-budget" in cell.reason for cell in record.cells)
    assert record.timings == []


def test_a_visit_that_would_overrun_the_budget_is_not_begun(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])

    class Slow(FakePool):
        def ask(self, system, what, kind, seconds=None):
            now[0] += 3 * what.prompts.size * what.generate / 5
            return super().ask(system, what, kind, seconds)

    bench = Bench(tmp_path, cells=((1, 4), (8, 4)))
    run_rounds(bench.grid, bench.results, Slow(), Clock(100.0), 0, lambda done: None)
    counts = {(place.engine, place.batch): len(state.repeats) for place, state in bench.results.states.items()}
    assert counts["a", 1] >= 1
    assert counts["a", 8] == counts["b", 8] == 0  # 96 seconds each, after what the small cells took
    assert now[0] <= 100


def test_the_same_command_again_adds_only_what_is_missing(tmp_path):
    whole = Bench(tmp_path)
    record = whole.run(FakePool())
    removed = read_timings(tmp_path, record.timings)[-1]
    for path in (tmp_path / "rows" / "timings").glob("*.parquet"):
        if read_timings(tmp_path, [path.name])[0] == removed:
            path.unlink()
    pool = FakePool()
    again = Bench(tmp_path).run(pool)
    assert [(engine, generate) for engine, _, generate in pool.asked] == [(removed.engine, 3), (removed.engine, 5)]
    assert len(again.timings) == len(record.timings)
    orders = [timing.order for timing in read_timings(tmp_path, again.timings)]
    assert len(set(orders)) == len(orders)
    assert read_bench_record(tmp_path) == again


def test_repeats_of_another_version_of_an_engine_do_not_count(tmp_path):
    Bench(tmp_path).run(FakePool())
    bench = Bench(tmp_path)
    other = Results(tmp_path, bench_record(), bench.results.states, Silent())
    other.open(EngineRecord("a", "fp32", None), {"engine": "a", "version": "2"})
    assert all(not state.repeats for state in other.states.values())


def test_a_page_is_settled_when_both_its_medians_are_known():
    def state(*seconds):
        return CellState([Timing("a", "v", 1, 1, 0, 0, prompt, (step,)) for prompt, step in seconds])

    assert not state(*[(1.0, 1.0)] * 5).is_settled  # five have no interval
    assert state(*[(1.0, 1.0)] * 6).is_settled
    assert not state(*[(1.0, 1.0 + 0.02 * i) for i in range(6)]).is_settled
    assert not state(*[(1.0 + 0.02 * i, 1.0) for i in range(6)]).is_settled
