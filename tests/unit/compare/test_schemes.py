"""Schemes from a recipe's name to the report, and what is refused before any work."""

import json

import pytest

from qeval.cli.app import run_program
from qeval.compare.settings_json import settings_of
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.recipe_files import load_recipes
from qeval.store.run import read_run
from qeval.store.variants import load_variant
from tests.fixtures.bench import Bench, kl

STATIC = "rtn:int8-channel+a-fp8-static+k-int8-channel"
METHODS = ("rtn:g32", "rtn:g32+kv-int4", "fp16+kv-int4", "fp16+kv-int8", "int8-w8a8", "rtn:int8-channel", STATIC)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schemes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        flags = {"tasks": "kl,ppl,mmlu,drift", "calibration_samples": "4", "methods": ",".join(METHODS)}
        drift = {"drift_prompts": "2", "drift_prompt_tokens": "8", "drift_tokens": "6"}
        assert bench.compare("--quiet", **flags, **drift) == 0
    return bench


@pytest.fixture(scope="module")
def manifests(place):
    found = {}
    for record in json.loads((place.out / "run.json").read_text())["variants"]:
        path = next((place.folder / "home" / "variants").glob(f"{record['key']}/manifest.json"), None)
        if path is not None:
            found[record["name"]] = json.loads(path.read_text())
    return found


def test_each_part_adds_its_loss(place):
    loss = {name: kl(place.out, name) for name in METHODS}
    assert 0 < loss["fp16+kv-int8"] < loss["fp16+kv-int4"] < loss["rtn:g32+kv-int4"]
    assert loss["rtn:g32"] < loss["rtn:g32+kv-int4"]
    assert loss["rtn:int8-channel"] < loss["int8-w8a8"]
    assert loss["rtn:int8-channel"] < loss[STATIC]


def test_questions_and_continuations_are_scored_too(place):
    for variant in place.report()["variants"]:
        assert {"drift_equal", "mmlu_acc"} <= variant["metrics"].keys()


def test_a_scheme_is_in_the_manifest_only_where_it_is_used(manifests):
    assert not {"scheme", "ranges"} & manifests["rtn:g32"].keys()
    assert not {"activations", "keys", "values"} & manifests["rtn:g32"]["recipe"].keys()
    assert manifests["rtn:g32+kv-int4"]["scheme"] == {"keys": "int4-token", "values": "int4-token"}
    assert manifests["int8-w8a8"]["scheme"] == {"activations": "int8-token"}
    assert manifests[STATIC]["scheme"] == {"activations": "fp8-tensor", "keys": "int8-channel"}
    assert len(manifests[STATIC]["ranges"]) == 2 * 7 + 2
    assert manifests[STATIC]["calibration"]["samples"] == 4
    assert manifests["fp16+kv-int4"]["weights"] == []
    assert manifests["fp16+kv-int4"]["bits_per_weight"] == manifests["fp16+kv-int4"]["bits_per_weight_model"]


def test_the_weights_of_a_scheme_are_those_without_it(manifests):
    assert manifests["rtn:g32"]["weights"] == manifests["rtn:g32+kv-int4"]["weights"]
    assert manifests["rtn:g32"]["weights_sha256"] == manifests["rtn:g32+kv-int4"]["weights_sha256"]
    assert manifests["rtn:g32"]["key"] != manifests["rtn:g32+kv-int4"]["key"]


def test_the_report_says_all_three(place):
    details = {each["name"]: each["details"] for each in place.report()["variants"]}
    assert details["rtn:g32+kv-int4"]["keys"] == "int4-token (a scale a token and head)"
    assert details["int8-w8a8"]["activations"] == "int8-token (a scale a token)"
    heads = 2 * 2 * 2 * 16  # layers, keys and values, heads, size
    assert details["fp16+kv-int4"]["bits per cached token"] == f"{heads * (4 + 32 / 16):,.0f} (6.00 a number)"
    page = (place.out / "report.md").read_text()
    assert "Bits/cached token" in page
    assert "fp8-tensor (a static scale a tensor)" in page


def test_settings_name_a_scheme_where_there_is_one_and_read_back(place):
    record = read_run(place.out)
    written = record.settings["settings"]["recipes"]
    assert "keys" not in written[0]
    assert written[1]["keys"] == "int4-token"
    assert settings_of(record)[1].recipes == tuple(map(parse_method, METHODS))


def test_a_variant_of_a_scheme_is_scored_from_its_folder(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    key = {each["name"]: each["key"] for each in json.loads((place.out / "run.json").read_text())["variants"]}[STATIC]
    folder = place.folder / "home" / "variants" / key
    out = tmp_path / "again"
    given = ("--variant", f"mine={folder}")
    assert place.compare("--quiet", *given, tasks="kl,ppl", methods=None, out=str(out)) == 0
    assert kl(out, "mine") == kl(place.out, STATIC)
    assert place.compare("--quiet", *given, "--stream", tasks="kl", methods=None, out=str(tmp_path / "s")) == 0
    assert kl(tmp_path / "s", "mine") == pytest.approx(kl(out, "mine"), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--backend", "ort"], "--backend ort"),
        (["--backend", "torch,llama.cpp"], "--backend llama.cpp"),
    ],
)
def test_what_runs_weights_alone_refuses_a_scheme_before_any_work(place, tmp_path, flags, says, capsys, monkeypatch):
    monkeypatch.setattr("qeval.compare.plan.loaded_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("qeval.compare.plan.kinds_of", lambda _: [])
    assert place.compare(*flags, tasks="kl", methods="rtn:g32+kv-int8", out=str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "rtn:g32+kv-int8" in error


def test_quantize_writes_a_scheme(place, tmp_path):
    assert place.quantize("rtn:g32+a-int8-static+kv-int8", tmp_path / "mine") == 0
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert manifest["scheme"] == {"activations": "int8-tensor", "keys": "int8-token", "values": "int8-token"}
    variant = load_variant(tmp_path / "mine")
    assert variant.scheme.names() == manifest["scheme"]
    assert len(variant.ranges) == 14
    assert all(float(amax) > 0 for amax in variant.ranges.values())


@pytest.mark.parametrize(
    ("command", "says"),
    [("export", "keys and values of one format"), ("bench", "weights alone"), ("sensitivity", "weights alone")],
)
def test_commands_refuse_a_scheme_that_they_do_not_take(place, tmp_path, command, says, capsys):
    flag = "--methods" if command == "bench" else "--method"
    flags = [flag, "rtn:g32+kv-int8", "--model", str(place.model), "--out", str(tmp_path / "out")]
    flags += ["--calibration", str(place.seen)] if command == "sensitivity" else []
    assert run_program([command, *flags]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rtn+kv-int9", "nearest: int"),
        ("rtn+a-fp8-tokn", "nearest: token"),
        ("rtn+q-int8", "Unknown prefix"),
        ("none", "rounds nothing"),
        ("fp16:int4+kv-int8", "takes no words"),
        ("rtn:int4-w8a8", "8 bits"),
    ],
)
def test_words_that_mean_nothing_are_refused(place, tmp_path, name, says, capsys):
    assert place.compare(tasks="kl", methods=name, out=str(tmp_path / "out")) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_blocks_of_ggml_that_do_not_divide_a_head_are_refused(place, tmp_path, capsys):
    assert place.compare(tasks="kl", methods="fp16+kv-q8_0", out=str(tmp_path / "out")) == 2
    assert "don't divide the keys" in " ".join(capsys.readouterr().err.split())


def test_yaml_says_a_scheme_field_by_field(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(
        "variants:\n- {name: a, method: 'rtn:int8-channel', activations: int8, keys: int8-channel}\n"
        "- {name: b, method: bf16, values: q4_0}\n- {name: c, method: awq+kv-int8, keys: fp8}\n"
    )
    first, second, third = load_recipes(path)
    assert first.scheme.names() == {"activations": "int8-token", "keys": "int8-channel"}
    assert (second.method, second.scheme.names()) == ("none", {"values": "q4_0"})
    assert third.scheme.names() == {"keys": "fp8-token", "values": "int8-token"}
    path.write_text("variants:\n- {name: a, method: rtn, keys: int9}\n")
    with pytest.raises(UsageError, match="nearest"):
        load_recipes(path)


@pytest.mark.parametrize(
    ("name", "method", "grid", "activations"),
    [
        ("fp8-w8a8", "rtn", "fp8-channel", "fp8-token"),
        ("awq:int8-w8a8+a-fp8", "awq", "int8-channel", "fp8-token"),
        ("fp8-tensor+a-fp8-static", "rtn", "fp8-tensor", "fp8-tensor"),
        ("nvfp4+a-nvfp4", "rtn", "nvfp4", "nvfp4"),
        ("awq:mxfp4-rceil+a-mxfp8-rceil+kv-fp8", "awq", "mxfp4-rceil", "mxfp8-rceil"),
        ("gptq:g32+a-int8", "gptq", "g32", "int8-token"),
        ("hqq:int4-g64+a-int8", "hqq", "int4-g64", "int8-token"),
    ],
)
def test_any_weights_go_with_any_activations(name, method, grid, activations):
    recipe = parse_method(name)
    assert (recipe.method, recipe.grid, recipe.activations) == (method, grid, activations)


def test_identities_without_a_scheme_name_none():
    assert not {"activations", "keys", "values"} & parse_method("rtn:g32").identity().keys()
    assert parse_method("rtn+a-fp8").identity() == parse_method("rtn+a-fp8-token").identity()
    assert parse_method("int8-w8a8").identity() == parse_method("rtn:int8-channel+a-int8-token").identity() | {
        "grid": "int8-channel"
    }
    assert parse_method("rtn+a-fp8").identity() != parse_method("rtn").identity()
