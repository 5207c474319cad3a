"""Mixes of several budgets: groups are tried once, what they came to is kept, and the choice is what it was without."""

import json
import re

import pytest

from qeval.quantize import sensitivity
from tests.fixtures.bench import Bench

SETTINGS = {"calibration_samples": "4", "calibration_length": "24", "tasks": "ppl", "max_windows": "1"}


@pytest.fixture
def counted(monkeypatch):
    """The names that sensitivities were measured for, once a measurement."""
    original, calls = sensitivity.measure, []

    def measure(*given):
        calls.append(original(*given))
        return calls[-1]

    monkeypatch.setattr("qeval.quantize.context.sensitivity.measure", measure)
    return calls


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def compared(bench, home, monkeypatch, methods, *, out="out"):
    monkeypatch.setenv("QEVAL_HOME", str(home))
    assert bench.compare("--quiet", out=str(home / out), methods=methods, **SETTINGS) == 0
    return {
        manifest["recipe"]["budget"]: (manifest["weights_sha256"], manifest["choices"])
        for manifest in (json.loads(path.read_text()) for path in home.rglob("manifest.json"))
    }


def test_budgets_share_one_measurement_in_a_run_and_with_the_next(bench, tmp_path, monkeypatch, counted):
    first = compared(bench, tmp_path / "a", monkeypatch, "mixed-rtn:g32-5.5bpw,mixed-rtn:g32-6bpw")
    assert len(counted) == 1
    later = compared(bench, tmp_path / "a", monkeypatch, "mixed-rtn:g32-7bpw", out="later")
    assert len(counted) == 1
    alone = compared(bench, tmp_path / "b", monkeypatch, "mixed-rtn:g32-7bpw")
    assert len(counted) == 2
    assert set(first) == {5.5, 6.0}
    assert later[7.0] == alone[7.0]
    assert later[7.0][0] != first[6.0][0]


def test_another_grid_or_method_is_tried_anew(bench, tmp_path, monkeypatch, counted):
    compared(bench, tmp_path, monkeypatch, "mixed-rtn:g32-6bpw,mixed-rtn:int3-g32-6bpw,mixed:g32-6bpw")
    assert len(counted) == 3


def test_a_format_is_tried_once_for_all_mixes_that_have_it(bench, tmp_path, monkeypatch, counted):
    compared(bench, tmp_path, monkeypatch, "mixed-rtn:int4-g32/nvfp4-4.8bpw,mixed-rtn:nvfp4/int8-g32/bf16-7bpw")
    assert len(counted) == 3
    shared = compared(bench, tmp_path, monkeypatch, "mixed-rtn:int4-g32/int8-g32/bf16-7.5bpw", out="later")[7.5]
    assert len(counted) == 3
    alone = compared(bench, tmp_path / "new", monkeypatch, "mixed-rtn:int4-g32/int8-g32/bf16-7.5bpw")[7.5]
    assert shared == alone


def test_a_torn_record_is_told_and_made_again(bench, tmp_path, monkeypatch, counted, capfd):
    first = compared(bench, tmp_path, monkeypatch, "mixed-rtn:g32-6bpw")
    (kept,) = (tmp_path / "trials").iterdir()
    kept.write_text(kept.read_text()[:40])
    later = compared(bench, tmp_path, monkeypatch, "mixed-rtn:g32-7bpw", out="later")
    assert len(counted) == 2
    assert re.search(
        r"trials/\w+\.json is torn; what it held is measured again", re.sub(r"\s+", " ", capfd.readouterr().err)
    )
    assert later[6.0] == first[6.0]
    assert len(json.loads(kept.read_text())["kl_nats"]) == len(counted[0])
