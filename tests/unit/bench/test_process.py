"""The process of an engine: it answers, and whatever becomes of it is told in one sentence."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qeval.bench import worker as child_module
from qeval.bench.energy import _meter, energy_meter
from qeval.bench.engine_pool import PooledEngine, engine_pool, prepare_process
from qeval.bench.engines.base import FreeRun, free_run
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.replay import ReplayEngine
from qeval.bench.messages import Choose, Failed, OpenRequest, Prepared, PrepareRequest, Ready, Time, Timed
from qeval.bench.peak_memory import _sampled, peak_rss
from qeval.bench.worker import _answer, _Worker
from qeval.bench.worker_handle import EngineError, WorkerHandle
from qeval.errors import QevalError, UsageError
from qeval.models.source import ModelSource
from tests.fixtures.engines import prompts

OPENING = EngineSpec(ModelSource("none", "folder"), None)
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    made = WorkerHandle(tmp_path_factory.mktemp("log") / "log")
    place = made.ask(PrepareRequest("replay", OPENING), Prepared).place
    made.ask(OpenRequest("replay", OPENING, place), Ready)
    yield made
    made.end()


def test_an_open_engine_says_what_it_is(tmp_path):
    made = WorkerHandle(tmp_path / "log")
    ready = made.ask(OpenRequest("replay", OPENING, tmp_path), Ready)
    own = ReplayEngine()
    assert ready.identity == own.identity
    assert ready.memory.weights_bytes == own.memory().weights_bytes
    assert ready.max_length == own.max_length
    assert ready.rss_bytes > ready.memory.weights_bytes
    made.end()
    assert not made.is_alive


def test_a_run_has_a_time_for_the_prompt_and_for_each_further_token(child):
    timed = child.ask(Time(prompts(2, 5, 256), 4), Timed)
    assert timed.prompt_seconds > 0
    assert len(timed.step_seconds) == 3
    assert min(timed.step_seconds) > 0
    assert timed.peak_generate_bytes > 10 * MEGABYTE
    assert timed.energy_joules is None
    assert timed.compiled_seconds == 0


def test_free_runs_cross_the_pipe_as_they_are(child):
    prompt = tuple(prompts(1, 6, 256)[0].tolist())
    found, own = child.ask(Choose(prompt, 5), FreeRun), free_run(ReplayEngine(), prompt, 5)
    assert found.tokens == own.tokens
    np.testing.assert_array_equal(found.logits, own.logits)


def test_what_an_engine_refuses_leaves_it_open(child):
    with pytest.raises(EngineError, match="batch of 65") as refused:
        child.ask(Time(prompts(65, 2, 256), 2), Timed)
    assert refused.value.trouble == "refused"
    assert child.ask(Time(prompts(1, 2, 256), 2), Timed)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_process_that_is_killed_is_told_by_the_signal(tmp_path, number, name):
    made = WorkerHandle(tmp_path / "log")
    os.kill(made.pid, number)
    with pytest.raises(EngineError, match=name) as told:
        made.ask(PrepareRequest("replay", OPENING), Prepared)
    assert told.value.trouble == "failed"
    assert not made.is_alive


def test_a_kill_by_the_system_for_want_of_memory_is_told_as_that(tmp_path, monkeypatch):
    counts = iter([4, 5])
    monkeypatch.setattr("qeval.bench.worker_handle._oom_kills", lambda: next(counts))
    made = WorkerHandle(tmp_path / "log")
    os.kill(made.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="Out of memory") as told:
        made.ask(PrepareRequest("replay", OPENING), Prepared)
    assert told.value.trouble == "oom"


def test_one_that_does_not_answer_is_ended(tmp_path):
    made = WorkerHandle(tmp_path / "log")
    os.kill(made.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not answer within 0 s"):
        made.ask(PrepareRequest("replay", OPENING), Prepared, seconds=0.2)
    assert not made.is_alive


def test_ctrl_c_is_not_the_childs(child):
    os.kill(child.pid, signal.SIGINT)
    assert child.ask(Time(prompts(1, 2, 256), 2), Timed)


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (MemoryError(), Failed("oom", "Out of memory.", fatal=True)),
        (MemoryError("no room"), Failed("oom", "Out of memory: no room.", fatal=True)),
        (UsageError("It can't."), Failed("refused", "It can't.")),
        (QevalError("It broke."), Failed("failed", "It broke.")),
        (ValueError("one\ntwo"), Failed("failed", "ValueError: one", fatal=True)),
    ],
)
def test_whatever_is_raised_is_an_answer(monkeypatch, error, failed):
    def raising(*_):
        raise error

    monkeypatch.setattr(child_module.registry, "prepare_engine", raising)
    assert _answer(_Worker(), PrepareRequest("replay", OPENING)) == failed


def test_an_engines_process_holds_no_runtime_that_the_engine_does_not_need():
    code = "import sys, qeval.bench.worker; print([n for n in ('torch', 'onnxruntime', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def touched(megabytes):
    return np.ones(megabytes * MEGABYTE, np.uint8)


def added_by_a_phase(meter):
    before = touched(200)
    del before
    with meter() as read:
        small = read()
    with meter() as read:
        held = touched(150)
        time.sleep(0.05)
        del held
        return read() - small


@pytest.mark.parametrize("meter", [peak_rss, _sampled])
def test_the_peak_of_a_phase_is_what_was_held_at_once_in_it(meter):
    # its own process: where other tests ran before, the allocator may hold free blocks that take the array unseen
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        added = fresh.submit(added_by_a_phase, meter).result()
    assert 140 * MEGABYTE < added < 190 * MEGABYTE


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, counts=True):
        self.counts, self.millijoules = counts, iter([1000, 1000, 4500])

    def nvmlInit(self):  # noqa: N802 - NVML's own name
        pass

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if not self.counts:
            raise self.NVMLError
        assert handle == 1
        return next(self.millijoules)


def test_energy_is_nvmls_in_joules():
    meter = _meter(FakeNvml(), 1)
    assert -meter() + meter() == pytest.approx(3.5)


def test_energy_that_nothing_counts_is_none():
    assert energy_meter("cpu") is None
    assert _meter(FakeNvml(counts=False), 1) is None


def system(variant):
    return PooledEngine("replay", variant, OPENING, Path())


def time_of(running, which):
    return running.ask(which, Time(prompts(1, 2, 256), 2), Timed)


def test_a_process_that_died_is_replaced_when_it_is_asked_again(tmp_path):
    with engine_pool(tmp_path) as running:
        time_of(running, system("a"))
        running.mark_warm(system("a"), 1, 2)
        os.kill(running._engines["replay", "a"].worker.pid, signal.SIGKILL)
        running._engines["replay", "a"].worker._process.join()
        assert time_of(running, system("a"))
        assert not running.is_warm(system("a"), 1, 2)


def test_engines_are_kept_while_memory_allows_and_the_longest_unused_goes_first(tmp_path, monkeypatch):
    with engine_pool(tmp_path) as running:
        for name in ("a", "b", "a"):
            running.ready(system(name))
        assert set(running._engines) == {("replay", "a"), ("replay", "b")}
        assert not running.is_crowded
        little = iter([10, 10, 1 << 60])  # what there is in all, what is free, what is free without the first that goes
        memory = SimpleNamespace(total=100)
        monkeypatch.setattr(
            "qeval.bench.engine_pool.psutil.virtual_memory",
            lambda: SimpleNamespace(**vars(memory), available=next(little)),
        )
        running.ready(system("c"))
        assert set(running._engines) == {("replay", "a"), ("replay", "c")}
        assert running.is_crowded
        workers = [engine.worker for engine in running._engines.values()]
    assert not any(worker.is_alive for worker in workers)


def test_what_is_prepared_is_prepared_in_a_process_that_is_gone_then(tmp_path):
    with prepare_process(tmp_path) as place:
        assert place.prepare("replay", OPENING) == Path()
        worker = place._worker
        with pytest.raises(EngineError, match="Unknown engine") as told:
            place.prepare("no such", OPENING)
        assert told.value.trouble == "refused"
    assert not worker.is_alive
