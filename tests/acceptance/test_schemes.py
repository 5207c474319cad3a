"""Schemes on the demo model against what NVIDIA Model Optimizer 0.47 fake-quantizes (torch, CPU, fp32).

The protocol: the first 4 windows of 1024 tokens of WikiText-2's test file, tokenized once, no special tokens, KL at
every position; static ranges from the first 16 x 512 tokens of its valid file. What is only ordered among itself is run
on the first window. Minutes long, and only where the data lies beside the project.
"""

import pytest

from tests.fixtures.data import needs
from tests.fixtures.demo_report import FORMATS, demo_report

STATIC_FP8, STATIC_INT8, INT8 = "rtn:fp8-tensor+a-fp8-static", "rtn:int8-channel+a-int8-static", "rtn:int8-channel"
ALONE = (
    "fp16+kv-int8",
    "fp16+kv-int4",
    "fp16+kv-q8_0-hadamard",
    "fp16+kv-q4_0",
    "fp16+kv-q4_0-hadamard",
    "fp16+kv-fp8",
)

pytestmark = [
    pytest.mark.slow,
    needs("wikitext2/test.txt", "wikitext2/valid.txt"),
]


def losses(out, methods, windows):
    """Mean KL in nats by variant."""
    flags = f"--tasks kl --max-windows {windows} --calibration-samples 16 --calibration-length 512"
    report = demo_report(out, methods, flags)
    return {each["name"]: each["metrics"]["kl_nats"]["value"] for each in report["variants"]}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Variants whose presets Model Optimizer has."""
    return losses(tmp_path_factory.mktemp("peers"), (STATIC_FP8, STATIC_INT8, INT8), 4)


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    """Variants that are ordered."""
    return losses(tmp_path_factory.mktemp("ordered"), (STATIC_INT8, INT8, "int8-w8a8", *ALONE), 1)


@pytest.mark.parametrize(
    ("name", "preset", "within"),
    [
        (INT8, "INT8_WEIGHT_ONLY_CFG", 0.01),
        (STATIC_FP8, "FP8_DEFAULT_CFG", 0.03),
        (STATIC_INT8, "INT8_DEFAULT_CFG", 0.03),
    ],
)
def test_model_optimizers_presets(peers, name, preset, within):
    expected = FORMATS["modelopt_presets"][preset]["kl"]
    assert peers[name] == pytest.approx(expected, rel=within)


def test_dynamic_scales_lose_less_than_static_ones(loss):
    assert loss[INT8] < loss["int8-w8a8"] < loss[STATIC_INT8]


def test_more_bits_of_keys_and_values_lose_less(loss):
    assert loss["fp16+kv-int8"] < loss["fp16+kv-fp8"] < loss["fp16+kv-int4"]
    assert loss["fp16+kv-q8_0-hadamard"] < loss["fp16+kv-q4_0-hadamard"] < loss["fp16+kv-q4_0"]
