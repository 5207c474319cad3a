"""What happens to a run from outside: killed at any moment, two at once, stopped by a signal."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from qeval.backends.torch import TorchBackend
from qeval.files.atomic import remove_abandoned
from qeval.files.process_id import Owner, this_process
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.variant import Variant
from qeval.store.ledger import read_ledger
from tests.fixtures.bench import Bench, row_differences
from tests.fixtures.kills import Moment, Place, finish, kill_and_go_on, kill_at, start, undisturbed
from tests.fixtures.tiny import tiny_llama

METHODS = "rtn:g32,awq:g32"
MOMENTS = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def whole(bench):
    """An undisturbed run, and the seconds that it took."""
    place = Place(bench.folder / "whole")
    return place, undisturbed(bench, place, methods=METHODS)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_that_is_killed_goes_on_to_the_same_rows(bench, whole, tmp_path, moment):
    place, seconds = whole
    share = (moment + random.Random(moment).random()) / MOMENTS  # spread over the run, each anywhere in its part
    killed = kill_and_go_on(bench, place, Place(tmp_path), share * seconds, methods=METHODS)
    assert killed.survived, (killed, (tmp_path / "log").read_text())
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("qeval.files.atomic.os.fsync", 1),  # the weights' hash is in a temporary file
        ("qeval.store.variants.digest_file", 1),  # a variant's weights are written, its manifest is not
        ("qeval.files.atomic.Path.rename", 1),  # both are, in a temporary folder
        ("qeval.compare.variants.collect", 1),  # calibrating the second variant
        ("qeval.files.records.publish", 2),  # rows or states are in a temporary file
        ("qeval.store.ledger.digest_file", 1),  # rows are there, and the ledger was not told
        ("qeval.score.jobs.variant_columns", 2),  # amid a variant's job
        ("qeval.store.attempts.write_text", 1),  # before the mark that it began
        ("qeval.compare.run.copy_manifests", 1),  # before the manifests
        ("qeval.store.rows.write_text", 1),  # before the index
        ("qeval.compare.run.keep_texts", 1),  # after it
        ("qeval.store.run.write_text", 1),  # before the record
        ("qeval.compare.run.finish", 1),  # after it, the mark still there
        ("qeval.report.render.write_bytes", 3),  # amid the plots
        ("qeval.report.render.write_text", 2),  # before the page
    ],
)
def test_a_run_that_is_killed_at_an_awkward_moment_goes_on_to_the_same_rows(bench, whole, tmp_path, function, call):
    killed = kill_at(bench, whole[0], Place(tmp_path), Moment(function, call), methods=METHODS)
    assert killed.in_time
    assert killed.survived, (killed, (tmp_path / "log").read_text())
    for name in ("report.json", "report.html", "run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_a_small_disk_that_fills_up_is_told_and_the_run_goes_on_when_there_is_room(bench, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        place = Place(disk)
        log = tmp_path / "log"
        arguments = ["compare", *bench.arguments(out=str(place.out), methods=METHODS), "--quiet"]
        assert finish(start(arguments, tmp_path / "home", log)) == 3
        *warnings, error = log.read_text().splitlines()
        assert error.startswith(f"error: Cannot write {place.out}")
        assert all(f"Cannot write {place.out}" in warning for warning in warnings), warnings  # a heartbeat's among them
        assert not list(place.out.rglob(".*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert finish(start(arguments, tmp_path / "home", log)) == 0, log.read_text()
        assert row_differences(place.out, whole[0].out) == []
        assert place.jobs_run().total() <= whole[0].jobs_run().total() + 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_dead_processes_left_goes_at_the_next_start_and_nothing_else(tmp_path):
    me, dead = this_process(), Owner(this_process().host, 2**22 - 1, 1.0)
    far = Owner("far", 1, 1.0)
    names = {owner: f".k.parquet.q-{owner.token}.abcdefgh" for owner in (me, dead, far)}
    for folder in (tmp_path, tmp_path / "rows"):
        folder.mkdir(exist_ok=True)
        for name in (*names.values(), ".keep", "k.part", f"{'0' * 32}.part"):
            (folder / name).write_text("x")
    (tmp_path / f".v.q-{dead.token}.abcdefgh").mkdir()
    (tmp_path / f".v.q-{dead.token}.abcdefgh" / "weights").write_text("x")
    assert len(remove_abandoned(tmp_path)) == 3
    assert {path.name for path in tmp_path.rglob("*")} == {
        names[me],
        names[far],
        ".keep",
        "k.part",
        f"{'0' * 32}.part",
        "rows",
    }
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    assert len(remove_abandoned(tmp_path)) == 2
    assert {path.name for path in tmp_path.rglob("*")} == {names[me], ".keep", "k.part", f"{'0' * 32}.part", "rows"}


def test_two_commands_at_once_share_the_work(bench, whole, tmp_path):
    place = Place(tmp_path)
    commands = [place.start(bench, "--quiet", methods=METHODS) for _ in range(2)]
    assert [finish(command) for command in commands] == [0, 0], place.log.read_text()
    assert row_differences(place.out, whole[0].out) == []
    assert place.variants() == whole[0].variants()
    assert set(place.jobs_run().values()) == {1}
    assert not place.left()
    assert (place.out / "report.html").is_file()


@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(bench, whole, tmp_path, number, code, said, share):
    place = Place(tmp_path)
    command = place.start(bench, "--quiet", methods=METHODS)
    while records(place) < share * records(whole[0]):  # not by the clock: the run goes faster on a machine left alone
        assert command.exitcode is None, place.log.read_text()
        time.sleep(0.005)
    os.kill(command.pid, getattr(signal, number))
    stopped = time.perf_counter()
    assert finish(command) == code, place.log.read_text()
    assert time.perf_counter() - stopped < whole[1]
    last = place.log.read_text().splitlines()[-1]
    assert last.startswith(f"{said}. What is done is kept; the same command goes on from there: qeval compare --model ")
    assert not place.left()
    assert {attempt.outcome for attempt in attempts(place)} <= {"done", "stopped"}
    assert finish(place.start(bench, "--quiet", methods=METHODS)) == 0
    assert row_differences(place.out, whole[0].out) == []


def records(place):
    return sum(1 for _ in place.out.glob("rows/*/*.parquet"))


def attempts(place):
    if not (place.out / "ledger.sqlite").exists():
        return []
    with read_ledger(place.out) as ledger:
        return ledger.attempts()


def test_weights_are_back_after_a_signal():
    model = tiny_llama()
    head, description = head_of(model), describe_model(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backend = TorchBackend(model, description, head, torch.float32)
    weights = {name: quantize_rtn(value, parse("int4-g32")) for name, value in before.items() if "proj" in name}
    variant = Variant("k", weights, {}, {}, (), (), {})

    def stop(*_):
        raise KeyboardInterrupt

    signal_before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt), backend.open(variant):
            assert not torch.equal(model.state_dict()[next(iter(weights))], before[next(iter(weights))])
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, signal_before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with backend.open(variant):
        pass
