"""`--executor ray`: a local cluster's workers give the rows of one process, also when one of them is killed."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from qeval.cli.app import run_program
from qeval.errors import QevalError
from qeval.executors.cluster import Needs
from qeval.store.ledger import read_ledger
from tests.fixtures.bench import Bench, row_differences

METHODS = "rtn:g32,rtn:int8-channel"
WINDOWS = "512"
DEADLINE = 240.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("ray"))
    bench.corpus.write_text("".join(f"Line {i}: the {i * i % 97} birds.\n" for i in range(2500)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests Ray's own 15 leaves its workers nothing
        yield bench


def arguments(place, out, *more):
    return ["compare", *place.arguments(methods=METHODS, max_windows=WINDOWS, tasks="kl,ppl", out=str(out)), *more]


def running(out):
    """The process ids of those that are at a job now."""
    try:
        with read_ledger(out) as ledger:
            owners = [each.owner for each in ledger.attempts() if each.outcome == "running"]
    except (FileNotFoundError, QevalError):
        return []  # it is about to be made
    return [int(re.search(r"process (\d+)", owner)[1]) for owner in owners]


def test_a_cluster_gives_the_rows_of_one_process_though_a_worker_is_killed(place, tmp_path):
    pytest.importorskip("ray")
    assert run_program(arguments(place, tmp_path / "alone", "--quiet")) == 0
    out = tmp_path / "out"
    program = "import sys; from qeval.cli.app import run_program; sys.exit(run_program(sys.argv[1:]))"
    ray = ["--executor", "ray", "--workers", "2", "--threads", "2", "--quiet"]
    command = [sys.executable, "-c", program, *arguments(place, out, *ray)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        killed = kill_one(process, out)
        _, told = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, told
    assert row_differences(out, tmp_path / "alone") == []
    with read_ledger(out) as ledger:
        tried = ledger.attempts()
    assert [each.outcome for each in tried].count("died") == 1
    owners = {int(re.search(r"process (\d+)", each.owner)[1]) for each in tried}
    assert killed in owners
    assert process.pid not in owners, "the command itself scored"


def kill_one(process, out):
    """Kill the first worker that is seen at a job, and held there until it is seen to be still at it."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        for worker in running(out)[:1]:
            os.kill(worker, signal.SIGSTOP)
            if worker in running(out):
                os.kill(worker, signal.SIGKILL)
                return worker
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("no worker came to work")


def test_ray_that_is_not_installed_is_named(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run_program(arguments(place, tmp_path / "out", "--executor", "ray")) == 2
    assert "pip install 'qeval[ray]'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--worker-gpus", "1"], "--worker-gpus is for --executor ray."),
        (["--executor", "ray", "--worker-gpus", "-1"], "--worker-gpus must not be below 0"),
    ],
)
def test_gpus_that_make_no_sense_are_refused(place, tmp_path, flags, sentence, capfd):
    assert run_program(arguments(place, tmp_path / "out", *flags)) == 2
    assert sentence in capfd.readouterr().err


def test_what_a_worker_needs_is_told():
    assert (str(Needs(1, 0)), str(Needs(4, 0.5))) == ("1 CPU", "4 CPUs and 0.5 GPUs")
