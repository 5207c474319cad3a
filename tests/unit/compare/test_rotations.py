"""Rotations from a recipe's name to the report, and what is refused before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qeval.cli.app import run_program
from qeval.compare.settings_json import settings_of
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.recipe_files import load_recipes
from qeval.store.run import read_run
from qeval.store.variants import load_variant
from tests.fixtures.bench import CONTEXT, Bench, kl
from tests.fixtures.tiny import save_tiny

ALL = "rtn:int8-channel+r1r2r4-seed2+a-int8-token+kv-int8"
METHODS = ("rtn:int8-channel", "rtn:int8-channel+r1r2", ALL, "quarot")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        shutil.rmtree(bench.model)
        save_tiny(bench.model, tie_word_embeddings=True, max_position_embeddings=CONTEXT)
        assert bench.compare("--quiet", tasks="kl,mmlu", methods=",".join(METHODS)) == 0
    return bench


def manifest_of(place, name):
    keys = {each["name"]: each["key"] for each in json.loads((place.out / "run.json").read_text())["variants"]}
    folder = place.folder / "home" / "variants" / keys[name]
    return folder, json.loads((folder / "manifest.json").read_text())


def test_rotated_variants_are_scored_next_to_plain_ones(place):
    loss = {name: kl(place.out, name) for name in METHODS}
    assert 0 < loss["rtn:int8-channel+r1r2"] < 1e-3
    assert loss["rtn:int8-channel+r1r2"] < loss[ALL] < loss["quarot"]


def test_manifests_name_places_seed_and_matrices(place):
    _, plain = manifest_of(place, "rtn:int8-channel")
    _, folded = manifest_of(place, "rtn:int8-channel+r1r2")
    folder, whole = manifest_of(place, ALL)
    assert not {"scheme", "input_rotations"} & plain.keys() | {"rotation"} & plain["recipe"].keys()
    assert not {"scheme", "input_rotations"} & folded.keys()
    assert (folded["recipe"]["rotation"], whole["recipe"]["rotation"]) == ("r1r2", "r1r2r4-seed2")
    assert whole["scheme"] == {
        "activations": "int8-token",
        "inputs": "r4",
        "keys": "int8-token",
        "values": "int8-token",
    }
    assert whole["input_rotations"] == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
    assert whole["details"]["rotation"].endswith("seed 2")
    assert "R4 of 112 channels (Hadamard 4 x Paley 28)" in whole["details"]["rotation"]
    assert folded["size_bytes"] == plain["size_bytes"] + 256 * 64 * 2  # the head is tied no more
    variant = load_variant(folder)
    assert variant.scheme.rotates_inputs
    assert [tuple(core.shape) for core in variant.input_rotations.values()] == [(28, 28)] * 2


def test_the_report_says_what_was_rotated(place):
    details = {each["name"]: each["details"] for each in place.report()["variants"]}
    assert details["quarot"]["rotation"] == (
        "R1 of 64 channels (Hadamard 64); R2 of 16 channels a head (Hadamard 16); seed 0"
    )
    assert details["quarot"]["rotated float model"].startswith("its logits moved by a share of ")
    assert "rotation" not in details["rtn:int8-channel"]


def test_settings_name_a_rotation_where_there_is_one_and_read_back(place):
    record = read_run(place.out)
    written = record.settings["settings"]["recipes"]
    assert "rotation" not in written[0]
    assert written[1]["rotation"] == "r1r2"
    assert settings_of(record)[1].recipes == tuple(map(parse_method, METHODS))


def test_a_rotated_variant_is_scored_from_its_folder(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    for name in (ALL, "rtn:int8-channel+r1r2"):
        folder, _ = manifest_of(place, name)
        out, given = tmp_path / f"again-{len(name)}", ("--variant", f"mine={folder}")
        assert place.compare("--quiet", *given, tasks="kl,mmlu", methods=None, out=str(out)) == 0
        assert kl(out, "mine") == kl(place.out, name)
        streamed = tmp_path / f"streamed-{len(name)}"
        assert place.compare("--quiet", *given, "--stream", tasks="kl,mmlu", methods=None, out=str(streamed)) == 0
        assert kl(streamed, "mine") == pytest.approx(kl(out, "mine"), rel=1e-6)


@pytest.mark.parametrize("method", ["rtn:int8-channel+r1r2-seed1", "quarot+a-int8-static", "awq:g32+r1"])
def test_a_streamed_model_gives_the_same_variant(place, tmp_path, monkeypatch, method):
    """Whose norms, embedding, head and details are the same too."""
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    found = []
    for flags in ((), ("--stream",)):
        out = tmp_path / f"out{len(flags)}"
        assert place.quantize(method, out, *flags) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        found.append((load_file(out / "weights.safetensors"), manifest))
    (ours, one), (theirs, other) = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= ours.keys()
    changing = {"seconds", "sha256", "weights_sha256"}
    assert {key: one[key] for key in one.keys() - changing} == {key: other[key] for key in other.keys() - changing}


@pytest.mark.parametrize(
    ("flags", "method", "says"),
    [
        (["--stream"], "rtn:g32+r1r2r4", "qeval makes R4 of models that are in memory"),
        (["--backend", "torch,llama.cpp"], "rtn:g32+r1r4", "it turns no inputs while running; leave r4 out"),
    ],
)
def test_what_runs_no_such_rotation_refuses_it(place, tmp_path, flags, method, says, capsys, monkeypatch):
    monkeypatch.setattr("qeval.compare.plan.loaded_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("qeval.compare.plan.kinds_of", lambda _: [])
    assert place.compare(*flags, tasks="kl", methods=method, out=str(tmp_path / "out")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert method in error


@pytest.mark.parametrize("command", ["bench", "sensitivity"])
def test_commands_for_models_as_they_are_refuse_a_rotation(place, tmp_path, command, capsys):
    flag = "--methods" if command == "bench" else "--method"
    flags = [flag, "rtn:g32+r1r2", "--model", str(place.model), "--out", str(tmp_path / "out")]
    flags += ["--calibration", str(place.seen)] if command == "sensitivity" else []
    assert run_program([command, *flags]) == 2
    assert "no rotated model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rtn+r3", "R3 turns queries and keys; say +k-int4-hadamard"),
        ("rtn+r5", "Unknown rotation"),
        ("rtn+r1r1", "twice"),
        ("rtn+r1+r2", "a second time"),
        ("rtn+r1-sed3", "its seed alone"),
        ("rtn+rr", "Unknown prefix"),
        ("fp16+r1r2", "go with quantized weights"),
        ("hqq+r1r2", "takes models as they are"),
    ],
)
def test_rotations_that_mean_nothing_are_refused(place, tmp_path, name, says, capsys):
    assert place.compare(tasks="kl", methods=name, out=str(tmp_path / "out")) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_yaml_says_a_rotation_in_its_field(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(
        "variants:\n- {name: a, method: 'rtn:int4-channel', rotation: r1r2-seed1}\n"
        "- {name: b, method: 'quarot+a-int4', rotation: r2}\n"
    )
    first, second = load_recipes(path)
    assert str(first.rotations) == "r1r2-seed1"
    assert (second.method, second.grid, second.activations) == ("gptq", "int4-channel", "int4-token")
    assert str(second.rotations) == "r2"
    path.write_text("variants:\n- {name: a, method: rtn, rotation: r7}\n")
    with pytest.raises(UsageError, match="nearest"):
        load_recipes(path)


def test_names_of_rotations():
    assert parse_method("rtn:int4-channel+r2r1").identity() == parse_method("rtn:int4-channel+r1r2-seed0").identity()
    assert parse_method("rtn+r1").identity() != parse_method("rtn+r1-seed1").identity()
    assert "rotation" not in parse_method("rtn").identity()
    assert parse_method("quarot").identity() == parse_method("gptq:int4-channel+r1r2").identity()
    assert parse_method("quarot-rtn+r1r2r4").identity() == parse_method("rtn:int4-channel+r1r2r4").identity()
    assert parse_method("quarot+a-int4").weights_alone.identity() == parse_method("quarot").identity()
