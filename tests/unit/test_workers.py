"""`--workers`: the same rows from several processes, whatever happens to one of them."""

import os
import signal
import time
from collections import Counter

import pytest

from qeval.errors import QevalError
from qeval.executors import processes
from qeval.executors.processes import helping
from qeval.progress import Silent
from qeval.store.ledger import read_ledger
from qeval.store.rows import RowStore
from tests.fixtures.bench import Bench
from tests.fixtures.kills import CONTEXT
from tests.fixtures.preloaded import SHARD_TOKENS

METHODS = "rtn:g32,rtn:int8-channel"


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(processes, "_CONTEXT", CONTEXT)
    monkeypatch.setattr("qeval.score.corpus._SHARD_TOKENS", SHARD_TOKENS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("workers"))
    bench.corpus.write_text("".join(f"Line {i}: the {i * i % 97} birds.\n" for i in range(100)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        patch.setattr("qeval.score.corpus._SHARD_TOKENS", SHARD_TOKENS)
        assert bench.compare("--quiet", methods=METHODS, max_windows="32") == 0
    return bench


def files(out):
    return {path.name: path.read_bytes() for path in (out / "rows").rglob("*") if path.is_file()}


def attempts(out):
    with read_ledger(out) as ledger:
        return ledger.attempts()


def test_two_workers_give_the_rows_of_one_and_do_each_job_once(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    flags = {"methods": METHODS, "max_windows": "32", "out": str(out), "threads": "2", "workers": "2"}
    assert place.compare("--quiet", **flags) == 0
    assert "warning" not in capfd.readouterr().err
    assert files(out) == files(place.out)
    tried = attempts(out)
    assert set(Counter((each.kind, each.key) for each in tried).values()) == {1}
    assert {each.outcome for each in tried} == {"done"}
    assert RowStore(out).read("tokens").num_rows == 3 * 32 * 64


def _ready(receive):
    receive()
    time.sleep(60)


def _fail(receive):
    receive()
    raise QevalError("It did not fit.")


def _kill(receive):
    receive()
    os.kill(os.getpid(), signal.SIGKILL)


def _end(receive):
    receive()


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_ready, []),
        (_end, []),
        (_fail, ["A worker ended early: It did not fit. What it had not finished was done by others."]),
        (
            _kill,
            ["A worker ended early: it was killed (exit code -9). What it had not finished was done by others."],
        ),
    ],
)
def test_helpers_end_with_the_block_and_say_what_went_wrong(work, said):
    progress, start = Silent(), time.perf_counter()
    with helping(work, [()], progress) as helpers:
        helpers.tell("go")
        if work is not _ready:
            for process, _ in helpers._running:
                process.join(20)
    assert progress.warnings == said
    assert time.perf_counter() - start < 30
