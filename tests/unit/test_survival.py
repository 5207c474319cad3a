"""What happens to a run from outside: killed at any moment, two at once, stopped by a signal."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from qeval.backends.torch import TorchBackend
from qeval.models.graph import describe
from qeval.models.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize
from qeval.quant.variant import Variant
from qeval.store.ledger import read_ledger
from tests.fixtures.bench import Bench
from tests.fixtures.kills import Place, finish, kill_and_go_on, undisturbed
from tests.fixtures.tiny import tiny_llama

METHODS = "rtn:g32,awq:g32"
MOMENTS = 8


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


def test_two_commands_at_once_share_the_work(bench, whole, tmp_path):
    place = Place(tmp_path)
    commands = [place.start(bench, "--quiet", methods=METHODS) for _ in range(2)]
    assert [finish(command) for command in commands] == [0, 0], place.log.read_text()
    assert place.rows() == whole[0].rows()
    assert place.variants() == whole[0].variants()
    assert set(place.jobs_run().values()) == {1}
    assert not place.left()
    assert (place.out / "report.html").is_file()


@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(bench, whole, tmp_path, number, code, said, share):
    place = Place(tmp_path)
    command = place.start(bench, "--quiet", methods=METHODS)
    command.join(share * whole[1])
    os.kill(command.pid, getattr(signal, number))
    stopped = time.perf_counter()
    assert finish(command) == code, place.log.read_text()
    assert time.perf_counter() - stopped < whole[1]
    last = place.log.read_text().splitlines()[-1]
    assert last.startswith(f"{said}. What is done is kept; the same command goes on from there: qeval compare --model ")
    assert not place.left()
    assert {attempt.outcome for attempt in attempts(place)} <= {"done", "stopped"}
    assert finish(place.start(bench, "--quiet", methods=METHODS)) == 0
    assert place.rows() == whole[0].rows()


def attempts(place):
    if not (place.out / "ledger.sqlite").exists():
        return []
    with read_ledger(place.out) as ledger:
        return ledger.attempts()


def test_weights_are_back_after_a_signal():
    model = tiny_llama()
    head, description = head_of(model), describe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backend = TorchBackend(model, description, head, torch.float32)
    weights = {name: quantize(value, parse("int4-g32")) for name, value in before.items() if "proj" in name}
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
