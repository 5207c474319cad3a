"""`--stream` with `--workers`: each worker runs its share of a model's jobs over the layers; rows are one process's."""

import os
import signal
import time
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qeval.backends.stream.session import StreamSession
from qeval.compare.machine import with_limit, workers_here
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.task_choice import TaskChoice
from qeval.compare.workers import share_of_worker
from qeval.config import Recipe
from qeval.executors.local import Share
from qeval.score import jobs as score_jobs
from qeval.store.ledger import JobId, read_ledger
from tests.fixtures.bench import Bench, row_differences
from tests.fixtures.kills import SHARD_TOKENS, fork_workers

METHODS = "rtn:g32,rtn:int8-channel"
LIMITED = ({"workers": 1}, {"workers": 2}, {"workers": 4}, {"workers": 2, "executor": "ray"})
FLAGS = {"methods": METHODS, "max_windows": "24", "threads": "2"}


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    fork_workers(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench whose OUT holds the rows of one process that streams."""
    bench = Bench(tmp_path_factory.mktemp("streamed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        patch.setattr("qeval.score.corpus._SHARD_TOKENS", SHARD_TOKENS)
        assert bench.compare("--quiet", "--stream", **FLAGS) == 0
    return bench


@pytest.fixture
def settings(tmp_path):
    model = ModelChoice("demo", stream=True)
    parts = (CorpusChoice(), TaskChoice(), CalibrationChoice())
    return Settings(model, (Recipe("rtn", "rtn"),), (), ("kl",), *parts, tmp_path / "out")


def compare(place, out, tmp_path, monkeypatch, *flags, **changed):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    more = ("--quiet", "--stream", "--workers", "2", *flags)
    return place.compare(*more, **FLAGS | {"out": str(out)} | changed)


def attempts(out):
    with read_ledger(out) as ledger:
        return ledger.attempts()


def test_two_workers_share_each_model_and_give_the_rows_of_one(place, tmp_path, monkeypatch, capfd):
    out, passes = tmp_path / "out", []
    original = StreamSession._run

    def counted(self, calls):
        until = time.monotonic() + 240
        while len({each.owner for each in attempts(out)}) < 2 and time.monotonic() < until:
            time.sleep(0.05)  # on a busy machine this process would do all before the other has started
        passes.append(len(calls))
        original(self, calls)

    monkeypatch.setattr(StreamSession, "_run", counted)  # of this process; the other was forked before
    assert compare(place, out, tmp_path, monkeypatch) == 0
    assert "warning" not in capfd.readouterr().err
    assert row_differences(out, place.out) == []
    tried = attempts(out)
    assert set(Counter((each.kind, each.key) for each in tried).values()) == {1}
    by_model = defaultdict(set)
    for each in tried:
        by_model[each.name].add(each.owner)
    assert max(len(owners) for owners in by_model.values()) == 2
    # its own shares in one pass each, and at most once more what the other had not begun
    assert 3 <= len(passes) <= 6, passes


def test_the_share_of_a_worker_that_is_killed_is_taken_up(place, tmp_path, monkeypatch, capfd):
    out, killed = tmp_path / "out", []
    original = score_jobs.variant_columns

    def kill_the_other(*args):
        until = time.monotonic() + 240
        while not killed and time.monotonic() < until:
            numbers = {int(each.owner.split()[1]) for each in attempts(out) if each.outcome == "running"}
            for number in numbers - {os.getpid()}:
                os.kill(number, signal.SIGKILL)
                killed.append(number)
        return original(*args)

    monkeypatch.setattr(score_jobs, "variant_columns", kill_the_other)
    assert compare(place, out, tmp_path, monkeypatch) == 0
    assert len(killed) == 1
    assert "it was killed (exit code -9). What it had not finished was done by others." in capfd.readouterr().err
    assert row_differences(out, place.out) == []


def test_a_finished_run_is_found_by_several_workers(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))
    before = len(attempts(place.out))
    assert place.compare("--quiet", "--stream", "--workers", "2", "--max-memory", "64MiB", **FLAGS) == 0
    assert len(attempts(place.out)) == before


@pytest.mark.parametrize(
    ("flags", "place", "expected"),
    [
        ({"workers": 2}, None, Share(0, 2)),
        ({"workers": 2}, 1, Share(1, 2)),
        ({"workers": 2, "executor": "ray"}, None, Share(0, 1)),  # the command does all that the cluster left
        ({"workers": 2, "executor": "ray"}, 0, Share(0, 2)),
        ({"workers": 1, "executor": "ray"}, 0, Share(0, 1)),
        ({"workers": 1}, None, None),
    ],
)
def test_what_a_worker_does_in_one_go(settings, flags, place, expected):
    assert share_of_worker(replace(settings, **flags), place) == expected


def test_models_in_memory_are_shared_by_single_jobs(settings):
    in_memory = replace(settings, model=replace(settings.model, stream=False), workers=2)
    assert share_of_worker(in_memory, 1) is None


def test_workers_on_one_device_share_half_of_its_free_memory(settings, monkeypatch):
    monkeypatch.setattr("qeval.compare.machine.free_bytes", lambda _: 1000)
    limits = [with_limit(replace(settings, **each)).max_memory for each in LIMITED]
    assert limits == [None, 250, 125, None]
    given = replace(settings, model=replace(settings.model, max_memory=7), workers=2)
    assert with_limit(given).max_memory == 7


def test_a_streamed_model_has_a_worker_on_every_gpu(settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (1 << 30, 8 << 30))
    on_gpus = replace(settings, model=replace(settings.model, name="m", device="cuda"))
    assert workers_here(on_gpus) == 3
    assert with_limit(replace(on_gpus, workers=3)).max_memory is None  # each has a GPU of its own


def job(units, key="0"):
    return SimpleNamespace(units=units, id=JobId("tokens", key, "model"), find=lambda: None)


@pytest.mark.parametrize("units", [[], [5], [1, 1, 1, 1, 1], [100, 1, 1, 1], [0, 3, 0], [7] * 97])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_shares_are_all_jobs_once_and_none_is_more_than_a_job_too_long(units, workers):
    jobs = [job(each) for each in units]
    shares = [Share(place, workers).of(jobs) for place in range(workers)]
    assert [each for share in shares for each in share] == jobs
    most = sum(units) / workers + max(units, default=0)
    assert all(sum(each.units for each in share) <= most for share in shares)
