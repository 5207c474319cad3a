"""The demo model on a real GPU beside the CPU: the same figures, and how fast they come (`pytest -m gpu -s`)."""

import json
import sys
import time

import pytest
import torch

from qeval.cli.app import run_program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METHODS = "rtn,awq,gptq,mixed,rtn:int8-channel"
TEXT = ("--offline", "--max-windows", "8", "--limit", "20")


def compare(out, *device, methods=METHODS):
    start = time.perf_counter()
    assert (
        run_program(["compare", "--model", "demo", "--methods", methods, *TEXT, *device, "--out", str(out), "--quiet"])
        == 0
    )
    return json.loads((out / "report.json").read_text()), time.perf_counter() - start


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return {
        "cpu": compare(folder / "cpu", "--device", "cpu"),
        "bf16": compare(folder / "bf16", "--device", "cuda", "--compute", "bf16"),
        "fp32": compare(folder / "fp32", "--device", "cuda", "--compute", "fp32"),
    }


def kl(report, name):
    (variant,) = [each for each in report["variants"] if each["name"] == name]
    return variant["metrics"]["kl_nats"]["value"]


@pytest.mark.parametrize("name", METHODS.split(","))
def test_fp32_gives_the_cpus_figures(reports, name):
    expected = kl(reports["cpu"][0], name)
    within = 1e-3 if name.startswith("rtn") else 0.05  # calibrated choices may fall otherwise by a rounding
    assert kl(reports["fp32"][0], name) == pytest.approx(expected, rel=within, abs=1e-6)


def test_int4_in_bf16_is_within_one_percent(reports):
    assert kl(reports["bf16"][0], "rtn") == pytest.approx(kl(reports["cpu"][0], "rtn"), rel=0.01)


def test_int8_in_bf16_is_within_its_floor(reports):
    floor = kl(reports["bf16"][0], "baseline@fp32")
    assert 0 < floor < 0.002
    expected = kl(reports["cpu"][0], "rtn:int8-channel")
    assert abs(kl(reports["bf16"][0], "rtn:int8-channel") - expected) <= 3 * floor


def test_a_streamed_run_gives_the_same_figures(reports, tmp_path):
    flags = ("--device", "cuda", "--compute", "fp32", "--stream", "--max-memory", "2GiB")
    streamed, _ = compare(tmp_path / "stream", *flags, methods="rtn,awq")
    assert kl(streamed, "rtn") == pytest.approx(kl(reports["fp32"][0], "rtn"), rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_one_model_on_several_gpus_gives_the_same_figures(reports, tmp_path):
    flags = ("--device", "cuda", "--compute", "fp32", "--device-map", "auto")
    spread, _ = compare(tmp_path / "spread", *flags, methods="rtn,awq")
    for name in ("rtn", "awq"):
        assert kl(spread, name) == pytest.approx(kl(reports["fp32"][0], name), rel=1e-4)


def test_speed_is_told(reports, capsys):
    with capsys.disabled():
        for name, (report, seconds) in reports.items():
            environment = report["provenance"]["environment"]
            sys.stdout.write(
                f"\n{name}: {environment['device']}, driver {environment.get('driver')}, {seconds:.1f} s whole; "
                f"peak GPU memory {(environment.get('peak_gpu_bytes') or 0) / 2**30:.2f} GiB; "
                f"baseline {report['baseline']['seconds']:.1f} s for {report['protocol']['nll_positions']} tokens and "
                f"{sum(task['items'] for task in report['tasks'])} questions\n"
            )
