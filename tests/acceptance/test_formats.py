"""Weights on grids of floats, on the demo model, against figures of implementations apart from this one.

The protocol and the figures with their source are in tests/data/formats_smollm2.json: the first 4 windows of 1024
tokens of WikiText-2's test file, tokenized once, KL at every position. Minutes long, and only where the data lies
beside the project.
"""

import pytest

from tests.fixtures.data import needs
from tests.fixtures.demo_report import FORMATS, demo_report, metric

PLAIN = {name: figures for name, figures in FORMATS["plain_weight_only"].items() if name != "note"}
TILES = "fp8-tile128"
_PRESETS = {TILES: "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"}

pytestmark = [pytest.mark.slow, needs("wikitext2/test.txt")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out, flags = tmp_path_factory.mktemp("formats"), "--tasks kl,ppl --max-windows 4"
    return demo_report(out, [*PLAIN, *_PRESETS], flags, calibrated=False)


@pytest.mark.parametrize("name", PLAIN)
def test_weights_alone_lose_what_a_plain_implementation_loses(report, name):
    assert metric(report, name, "kl_nats") == pytest.approx(PLAIN[name]["kl"], rel=0.01)


@pytest.mark.parametrize(("name", "preset"), _PRESETS.items())
def test_weights_alone_lose_what_model_optimizers_preset_loses(report, name, preset):
    expected = FORMATS["modelopt_presets"][preset]
    assert metric(report, name, "kl_nats") == pytest.approx(expected["kl"], rel=0.01)
