"""`--split`: each part of a scheme alone, beside all of it, on the same tokens."""

import json

import numpy as np
import pytest

from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.store.rows import RowStore
from tests.fixtures.bench import Bench, kl, row_differences
from tests.fixtures.gate import RELEASE, told

METHODS = "int8-w8a8,awq:g32+kv-int4,smoothquant"
PARTS = {
    "int8-w8a8": {"weights": "rtn:int8-channel", "activations": "fp16+a-int8-token"},
    "awq:g32+kv-int4": {"weights": "awq:g32", "keys": "fp16+k-int4-token", "values": "fp16+v-int4-token"},
    "smoothquant": {"weights": "smoothquant:int8-channel"},
}
ADDED = {name for parts in PARTS.values() for name in parts.values()}
FLAGS = {"methods": METHODS, "tasks": "kl", "window": "160", "stride": "160", "max_windows": "3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("split"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        assert bench.compare("--quiet", "--split", **FLAGS) == 0
    return bench


@pytest.fixture(scope="module")
def variants(place):
    return {variant["name"]: variant for variant in place.report()["variants"]}


def test_parts_are_scored_beside_what_they_are_parts_of(variants):
    assert {name: variant["parts"] for name, variant in variants.items() if variant["parts"]} == PARTS
    assert {name for name, variant in variants.items() if variant["role"] == "part"} == ADDED
    assert {name for name, variant in variants.items() if variant["role"] == "variant"} == PARTS.keys()


def test_the_sum_over_all_is_that_of_the_rows(place, variants):
    table = RowStore(place.out).read("tokens").to_pandas()
    for name in ("int8-w8a8", "awq:g32+kv-int4"):
        mean = table.groupby("variant")["kl_nats"].mean()
        expected = sum(mean[part] for part in PARTS[name].values()) / mean[name]
        found = variants[name]["parts_over_joint"]
        assert np.isclose(found["value"], expected, rtol=1e-9)
        assert found["low"] <= found["value"] <= found["high"]
    assert variants["smoothquant"]["parts_over_joint"] is None  # its activations alone would be others


def test_a_part_named_by_hand_gives_the_same_loss(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))
    names = "rtn:int8-channel,fp16+a-int8-token,awq:g32,fp16+k-int4,fp16+v-int4"
    assert place.compare("--quiet", **{**FLAGS, "methods": f"int8-w8a8,{names}", "out": str(tmp_path / "out")}) == 0
    for name, part in zip(
        names.split(","), (p for each in list(PARTS.values())[:2] for p in each.values()), strict=True
    ):
        assert kl(tmp_path / "out", name) == kl(place.out, part)
    record = json.loads((tmp_path / "out" / "run.json").read_text())["variants"]
    assert record[0]["parts"] == PARTS["int8-w8a8"]  # told without --split too
    assert {each["role"] for each in record} == {"variant"}


def test_parts_are_told_apart_and_never_ranked_or_gated(place, variants, capfd):
    text = (place.out / "report.md").read_text()
    ranking, rest = text.split("## Variants", 1)
    assert not any(f"| {name} |" in ranking for name in ADDED)
    assert "KL by part" in rest
    assert "KL by position" in rest
    assert not any(variants[name]["pareto"] for name in ADDED)
    assert (place.out / "plots" / "parts.svg").is_file()
    rule = {"metric": "kl_nats", "at_most": "9 nats"}
    verdict = judge(place.out, Policy.model_validate({"name": "p", "rules": [rule]}))
    assert {each.name for each in verdict.variants} == PARTS.keys()
    code, _, error = told(capfd, place.out, "--policy", RELEASE, "--variant", "awq:g32")
    assert code == 2
    assert "'awq:g32' is a part of another variant, scored to tell losses apart" in error


def test_the_loss_by_position_is_that_of_the_rows(place, variants):
    table = RowStore(place.out).read("tokens").to_pandas()
    for name in PARTS:
        rows = table[table["variant"] == name]
        buckets = variants[name]["kl_by_position"]
        assert [(bucket["first"], bucket["last"]) for bucket in buckets] == [(0, 127), (128, 255)]
        for bucket in buckets:
            inside = rows[(rows["position"] >= bucket["first"]) & (rows["position"] <= bucket["last"])]
            assert bucket["positions"] == inside["kl_nats"].notna().sum()
            assert np.isclose(bucket["kl_nats"]["value"], inside["kl_nats"].mean(), rtol=1e-9)


def test_the_same_command_again_makes_nothing_anew(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))
    assert place.compare("--quiet", "--split", **{**FLAGS, "out": str(tmp_path / "again")}) == 0
    assert row_differences(tmp_path / "again", place.out) == []


def test_a_run_with_nothing_to_split_is_refused(place, tmp_path, capfd):
    assert place.compare("--split", **{**FLAGS, "methods": "rtn:g32", "out": str(tmp_path / "out")}) == 2
    assert "no recipe here rounds more than one of weights, activations, keys and values" in " ".join(
        capfd.readouterr().err.split()
    )


def test_parts_are_scored_on_the_first_backend_alone(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path / "bench")
    config = json.loads((bench.model / "config.json").read_text())
    (bench.model / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))  # the builder wants one
    flags = {"methods": "rtn:g32+kv-int8-tensor-ort", "tasks": "kl", "max_windows": "1", "backend": "torch,ort"}
    assert bench.compare("--quiet", "--split", **flags) == 0
    variants = {variant["name"]: variant for variant in bench.report()["variants"]}
    whole = "rtn:g32+kv-int8-tensor-ort"
    parts = ["rtn:g32", "fp16+k-int8-tensor-ort", "fp16+v-int8-tensor-ort"]  # which ONNX Runtime can't run apart
    assert set(variants) == {"baseline@ort", whole, f"{whole}@ort", *parts}
    assert list(variants[whole]["parts"].values()) == parts
    assert variants[f"{whole}@ort"]["parts"] == {}
    assert variants[f"{whole}@ort"]["metrics"]["kernel_kl_nats"]["value"] < 1e-6
