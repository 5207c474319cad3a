"""`qeval sweep --calibration a,b --calibration-seeds 2`: the spread of each method, from runs of each draw."""

import json

import numpy as np
import pytest

import qeval
from qeval.cli.app import run_program
from qeval.compare.calibration_draws import shuffle_parts
from tests.fixtures.bench import Bench, keywords, kl

METHODS = ["awq:int3-g32", "rtn:int3-g32", "gptq:int3-g32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        (folder / "other.txt").write_text("".join(f"{i} oxen met {i * i % 83} carts at dusk.\n" for i in range(30)))
        yield bench


def test_the_spread_over_texts_and_seeds_is_a_table(place, capfd):
    out = place.folder / "sweep"
    texts = f"{place.seen},{place.folder / 'other.txt'}"
    flags = place.arguments(methods=",".join(METHODS), model=None, tasks="kl", calibration=texts, out=str(out))
    assert run_program(["sweep", "--models", str(place.model), *flags, "--calibration-seeds", "2", "--quiet"]) == 0
    printed = capfd.readouterr().out
    assert "How far calibration moves the KL" in printed and "Which ranks calibration leaves standing" in printed
    found = json.loads((out / "sweep.json").read_text())["calibration"]
    assert (found["texts"], found["seeds"], found["unmoved"]) == (["seen.txt", "other.txt"], 2, ["rtn:int3-g32"])

    # the figures are those of the runs' own rows, and every draw has a run of its own
    cells = [out / "model" / f"{text}-seed{seed}" for text in ("seen.txt", "other.txt") for seed in (0, 1)]
    for each in found["methods"]:
        kls = [kl(cell, each["variant"]) for cell in cells]
        assert len(set(kls)) == 4
        assert (each["least"], each["most"]) == (pytest.approx(min(kls)), pytest.approx(max(kls)))
        assert each["mean"] == pytest.approx(np.mean(kls))
        assert None not in (each["text_sd"], each["seed_sd"], each["residual_sd"])
    (decision,) = found["decisions"]
    assert decision["difference"] > 0
    assert decision["is_decided"] == (decision["seeds"] is not None and decision["seeds"] <= 2)
    assert "(other.txt, seed 1)" in (out / "sweep.md").read_text()


def test_seed_0_is_the_text_as_it_is(place, tmp_path):
    options = keywords(place, methods=METHODS[:1], tasks=["kl"])
    plain = qeval.compare(str(place.model), **{**options, "out": tmp_path / "plain"})
    del options["out"]
    done = qeval.sweep([str(place.model)], out=tmp_path / "swept", calibration_seeds=2, **options)
    first, second = (run.metric(METHODS[0], "kl_nats").value for run in done.runs.values())
    assert first == plain.metric(METHODS[0], "kl_nats").value != second
    (method,) = done.spread.methods
    assert method.text_sd is None and method.mean == pytest.approx((first + second) / 2)


def test_a_draw_keeps_every_line_and_is_the_same_each_time():
    text = "".join(f"line {i}\n" for i in range(1000)) + "the last"
    drawn = shuffle_parts(text, 1)
    assert sorted(drawn.splitlines()) == sorted(text.splitlines())
    assert drawn == shuffle_parts(text, 1) != shuffle_parts(text, 2)


def test_a_sweep_over_calibration_without_kl_is_refused(place, tmp_path, capfd):
    flags = place.arguments(methods=METHODS[0], model=None, tasks="ppl", out=str(tmp_path / "out"))
    assert run_program(["sweep", "--models", str(place.model), *flags, "--calibration-seeds", "2"]) == 2
    assert "about the spread of KL; add kl to --tasks" in capfd.readouterr().err
    assert run_program(["sweep", "--models", str(place.model), *flags, "--calibration-seeds", "0"]) == 2


def test_two_texts_of_one_name_are_refused(place, tmp_path, capfd):
    (tmp_path / "seen.txt").write_text("another one")
    texts = f"{place.seen},{tmp_path / 'seen.txt'}"
    flags = place.arguments(methods=METHODS[0], model=None, tasks="kl", calibration=texts, out=str(tmp_path / "out"))
    assert run_program(["sweep", "--models", str(place.model), *flags]) == 2
    assert "Two of the calibration texts are called seen.txt; rename one." in capfd.readouterr().err
