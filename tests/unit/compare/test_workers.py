"""`--workers`: the same rows from several processes, whatever happens to one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest
from safetensors.torch import load_file, save_file

from qeval.errors import QevalError
from qeval.executors.processes import helping
from qeval.files.process_id import this_process
from qeval.identity import digest_file
from qeval.progress import Silent
from qeval.score import jobs as score_jobs
from qeval.store.ledger import LEDGER, read_ledger
from qeval.store.rows import RowStore
from qeval.store.seal import seal
from tests.fixtures.bench import Bench, row_differences, row_files
from tests.fixtures.chat import TEMPLATE, chat_flags, set_template, write_prompts
from tests.fixtures.kills import SHARD_TOKENS, Place, finish, fork_workers

METHODS = "rtn:g32,rtn:int8-channel"


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    fork_workers(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("workers"))
    bench.corpus.write_text("".join(f"Line {i}: the {i * i % 97} birds.\n" for i in range(100)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        patch.setattr("qeval.score.corpus._SHARD_TOKENS", SHARD_TOKENS)
        assert bench.compare("--quiet", methods=METHODS, max_windows="32") == 0
    return bench


def attempts(out):
    with read_ledger(out) as ledger:
        return ledger.attempts()


def test_workers_read_the_baselines_answers_to_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path)
    set_template(bench.model, TEMPLATE)
    flags = chat_flags(write_prompts(tmp_path / "prompts.jsonl"))
    assert bench.compare("--quiet", **flags, out=str(tmp_path / "one")) == 0
    assert bench.compare("--quiet", **flags, out=str(tmp_path / "two"), workers="2", threads="2") == 0
    assert row_differences(tmp_path / "two", tmp_path / "one") == []


def test_two_workers_give_the_rows_of_one_and_do_each_job_once(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    flags = {"methods": METHODS, "max_windows": "32", "out": str(out), "threads": "2", "workers": "2"}
    assert place.compare("--quiet", **flags) == 0
    assert "warning" not in capfd.readouterr().err
    assert row_differences(out, place.out) == []
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_helper_outlives_its_parent(number):
    parent = subprocess.Popen([sys.executable, "-m", "tests.fixtures.orphans"], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    gone, _ = psutil.wait_procs([child], timeout=30)
    assert gone


def compare(place, out, tmp_path, monkeypatch, **changed):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    flags = {"methods": METHODS, "max_windows": "32", "out": str(out), "threads": "2", "workers": "2"}
    return place.compare("--quiet", **flags | changed)


def others_at_work(out):
    """The numbers of other processes that run a job."""
    if not (out / LEDGER).exists():
        return []
    with read_ledger(out) as ledger:
        running = [each.owner for each in ledger.attempts() if each.outcome == "running"]
    numbers = [int(owner.split()[1]) for owner in running]
    return [number for number in numbers if number != os.getpid()]


def test_a_worker_that_is_killed_amid_a_job_costs_nothing_but_its_help(place, tmp_path, monkeypatch, capfd):
    out, killed = tmp_path / "out", []
    original = score_jobs.variant_columns

    def kill_the_other(*args):
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:  # in this process alone: the other was forked before
            for number in others_at_work(out):
                other = replace(this_process(), pid=number, started=psutil.Process(number).create_time())
                os.kill(number, signal.SIGKILL)
                (out / "rows" / "tokens").mkdir(parents=True, exist_ok=True)
                (out / "rows" / "tokens" / f".k.parquet.q-{other.token}.0").write_text("half")  # as if amid its writing
                killed.append(number)
        return original(*args)

    monkeypatch.setattr(score_jobs, "variant_columns", kill_the_other)
    assert compare(place, out, tmp_path, monkeypatch) == 0
    assert len(killed) == 1
    said = "A worker ended early: it was killed (exit code -9). What it had not finished was done by others."
    assert f"warning: {said}\n" in capfd.readouterr().err
    assert row_differences(out, place.out) == []
    assert Counter(each.outcome for each in attempts(out))["died"] <= 1
    assert sum(Counter((each.kind, each.key) for each in attempts(out)).values()) <= len(row_files(out))


def test_a_job_that_fails_in_one_worker_is_done_by_another(place, tmp_path, monkeypatch, capfd):
    out, failed = tmp_path / "out", []
    original = score_jobs.variant_columns

    def fail_once(*args):
        if not failed:
            until = time.monotonic() + 60
            while not others_at_work(out) and time.monotonic() < until:
                time.sleep(0.01)
            failed.append(1)
            raise QevalError("It failed here.")
        return original(*args)

    monkeypatch.setattr(score_jobs, "variant_columns", fail_once)
    assert compare(place, out, tmp_path, monkeypatch) == 0
    assert "warning" not in capfd.readouterr().err
    assert row_differences(out, place.out) == []
    assert Counter(each.outcome for each in attempts(out))["failed"] == 1


def test_a_job_that_fails_in_every_worker_fails_its_variant(place, tmp_path, monkeypatch, capfd):
    """A weight that is not finite fails wherever it is computed."""
    out = tmp_path / "out"
    folder = tmp_path / "broken"
    assert place.quantize("rtn:g32", folder) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = load_file(folder / "weights.safetensors")
    name = next(name for name in tensors if name.endswith(".scales"))
    tensors[name].fill_(float("nan"))
    save_file(tensors, folder / "weights.safetensors")
    manifest["weights_sha256"] = digest_file(folder / "weights.safetensors")
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    capfd.readouterr()
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    flags = {"methods": "rtn:g32", "max_windows": "32", "out": str(out), "threads": "2", "workers": "2"}
    assert place.compare("--quiet", "--variant", f"broken={folder}", **flags) == 3
    assert "warning: broken failed: " in capfd.readouterr().err
    variants = {each["name"]: each for each in json.loads((out / "run.json").read_text())["variants"]}
    assert variants["rtn:g32"]["status"] == "done"
    assert variants["broken"]["status"] == "failed"
    tries = Counter((each.kind, each.key) for each in attempts(out) if each.name == "broken")
    assert max(tries.values()) <= 2


def test_commands_of_other_settings_wait_for_each_other(place, tmp_path):
    one, other = Place(tmp_path / "both"), {"max_windows": "4"}
    first = one.start(place, methods="rtn:g32", **other)
    second = one.start(place, methods="rtn:int8-channel", **other)
    assert [finish(each) for each in (first, second)] == [0, 0], one.log.read_text()
    record = json.loads((one.out / "run.json").read_text())
    (last,) = [variant["name"] for variant in record["variants"]]
    rows = RowStore(one.out).read("tokens")
    assert set(rows["variant"].to_pylist()) == {"baseline", last}
    assert last in (one.out / "report.md").read_text()
    assert f"which writes into {one.out} with other settings: qeval compare --model" in one.log.read_text()
