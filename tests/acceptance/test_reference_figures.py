"""The main job on the demo model against figures that NVIDIA Model Optimizer 0.47 gave for it (torch, CPU, fp32).

The protocol: the first 16 windows of 1024 tokens of WikiText-2's test file, tokenized once, no BOS, KL at every
position; calibration on the first 16 x 512 tokens of its valid file. Minutes long, and only where the data lies beside
the project.
"""

import json
from pathlib import Path

import pytest

from qeval.cli.app import run

SHARED = Path(__file__).parents[3] / "shared"
DATA, REFERENCE = SHARED / "data" / "wikitext2", SHARED / "reference" / "modelopt_smollm2.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE.exists(), reason="no WikiText-2 and no reference figures beside the project"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    flags = "--methods rtn,rtn:int8-channel,awq --tasks kl,ppl --window 1024 --stride 1024 --max-windows 16 --bos never"
    texts = ["--corpus", str(DATA / "test.txt"), "--calibration", str(DATA / "valid.txt")]
    assert run(["compare", "--model", "demo", *flags.split(), *texts, "--out", str(out), "--quiet"]) == 0
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def reference():
    return json.loads(REFERENCE.read_text())["results"]


def metric(report, variant, name):
    (found,) = [v for v in report["variants"] if v["name"] == variant]
    return found["metrics"][name]["value"]


def test_the_baselines_perplexity(report, reference):
    assert report["baseline"]["metrics"]["ppl"]["value"] == pytest.approx(reference["base_fp32"]["ppl"], abs=0.002)


def test_rtn(report, reference):
    expected = reference["int4_rtn_b128"]
    assert metric(report, "rtn", "kl_nats") == pytest.approx(expected["mean_kl_nats"], abs=0.002)
    assert metric(report, "rtn", "ppl") == pytest.approx(expected["ppl"], rel=1e-3)
    assert metric(report, "rtn", "top1_agreement") == pytest.approx(expected["top1_agreement"], abs=1e-3)
    absolute = expected["modelopt_style_sum_p_absdiff"]
    assert metric(report, "rtn", "kl_abs_modelopt") == pytest.approx(absolute, rel=1e-3)


def test_int8_per_channel(report, reference):
    expected = reference["int8_per_channel"]["mean_kl_nats"]
    assert metric(report, "rtn:int8-channel", "kl_nats") == pytest.approx(expected, abs=5e-5)


def test_awq_loses_no_more_than_awq_full_of_the_peer(report):
    assert metric(report, "awq", "kl_nats") <= 0.203  # Model Optimizer's awq_full: 0.2027
