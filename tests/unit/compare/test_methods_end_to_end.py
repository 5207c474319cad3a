"""Methods that see the calibration text layer by layer or in one pass, from the command line to the report."""

import json
from types import SimpleNamespace

import pytest
import torch

from qeval.compare.variants import BaselineModel, Calibration, variant_key
from qeval.config import parse_method
from tests.fixtures.bench import Bench

METHODS = ("rtn:int3-g32", "gptq:int3-g32", "gptq:int3-g32-noclip", "mixed-rtn:int3-g32-fisher")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench on which the methods were compared; its cache is its own."""
    folder = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        flags = {"tasks": "kl,ppl", "calibration_samples": "6", "methods": ",".join(METHODS)}
        assert bench.compare("--quiet", **flags) == 0
    return bench


@pytest.fixture
def variants(place):
    return {variant["name"]: variant for variant in place.report()["variants"]}


def test_all_are_scored_at_the_size_of_their_grid(variants):
    assert tuple(variants) == METHODS
    sizes = [variants[name]["size_bytes"] for name in METHODS]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]
    assert all(variant["metrics"]["kl_nats"]["value"] > 0 for variant in variants.values())


def test_the_report_says_what_the_methods_decided(variants):
    gptq, mixed = variants["gptq:int3-g32"]["details"], variants["mixed-rtn:int3-g32-fisher"]["details"]
    assert gptq["clip search"] == "per block"
    assert gptq["columns"].startswith("largest second moment first")
    assert gptq["damping raised"] == "nowhere"
    assert float(gptq["loss on the calibration text"].split()[0]) < 1
    assert variants["gptq:int3-g32-noclip"]["details"]["clip search"] == "none"
    assert mixed["accepted"] in mixed["measured KL (nats)"]
    assert variants["mixed-rtn:int3-g32-fisher"]["mix"]["importance"] == "fisher"


def test_no_statistics_are_collected_for_methods_that_use_none(place, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "another"))
    monkeypatch.setattr("qeval.compare.variants.collect", lambda *_, **__: pytest.fail("collected"))
    assert place.compare("--quiet", tasks="kl", methods="gptq:g32", out=str(place.folder / "gptq")) == 0
    record = json.loads((place.folder / "gptq" / "run.json").read_text())
    assert record["calibration"]["samples"] == 4


def key(method, seed=0, tokens="a", config="c"):
    description = SimpleNamespace(float_kinds={})
    loaded = BaselineModel(
        None, description, None, "w", config, "name", torch.float16, torch.float32, torch.device("cpu")
    )
    return variant_key(parse_method(method), loaded, Calibration((), {"tokens_sha256": tokens}), seed)


def test_a_gptq_variants_key_holds_its_text_and_options_and_no_seed():
    own = key("gptq:g32")
    assert key("gptq:g32", seed=1) == own == key("gptq:g32-damp0.01-actorder-clip")
    changed = [
        key("gptq:g32", tokens="b"),
        key("gptq:g32", config="d"),
        *(key(f"gptq:g32-{word}") for word in ("noclip", "noactorder", "damp0.1", "head")),
    ]
    assert len({own, *changed}) == 7
    assert key("awq:g32", seed=1) != key("awq:g32")
