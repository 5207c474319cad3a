"""Checkpoints that round activations, keys and values, scored whole: against qeval's recipes of the same numbers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qeval.backends.torch import TorchBackend
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.store.variants import load_variant
from qeval.types import Request
from tests.fixtures import packers
from tests.fixtures.bench import CONTEXT, Bench, kl, records
from tests.fixtures.formats import CT, FP8, MODELOPT
from tests.fixtures.tiny import save_tiny

FLAGS = {"tasks": "kl", "max_windows": "2", "window": "32", "stride": "32"}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}


def compressed_with(form, arguments, **more):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}, "input_activations": arguments}
    return CT | {"format": form, "config_groups": {"group_0": group}} | more


def dynamic(kind, bits=8):
    return {"num_bits": bits, "type": kind, "strategy": "token", "dynamic": True}


CASES = {
    "ct-fp8-dynamic": (
        "rtn:fp8-channel+a-fp8-token", packers.fp8, compressed_with("float-quantized", dynamic("float")), 0,
    ),
    "ct-int8": ("rtn:int8-channel+a-int8-token", packers.int_quantized,
                compressed_with("int-quantized", dynamic("int")), 0),
    "ct-fp8-static": ("rtn:fp8-tensor+a-fp8-static+kv-fp8-tensor", packers.fp8,
                      compressed_with("float-quantized", STATIC, kv_cache_scheme=STATIC), 448),
    "ct-nvfp4": ("rtn:nvfp4+a-nvfp4", packers.nvfp4, compressed_with("nvfp4-pack-quantized", LOCAL), -2688),
    "mo-fp8": ("rtn:fp8-tensor+a-fp8-static+kv-fp8-tensor", packers.fp8,
               MODELOPT | {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, 448),
    "mo-nvfp4": ("rtn:nvfp4+a-nvfp4", packers.modelopt_nvfp4, MODELOPT | {"quant_algo": "NVFP4"}, 2688),
    "deepseek": ("rtn:fp8-tile128+a-fp8-g128", packers.fp8_tiles, FP8, 0),
}  # fmt: skip
"""The recipe whose numbers a checkpoint has, its packing, its configuration, and what its static scales multiply."""
RECIPES = list(dict.fromkeys(recipe for recipe, *_ in CASES.values()))


def scales_of(variant, largest, *, below_projections):
    """The tensors that say a variant's static ranges in a file."""
    tensors = {}
    for name, amax in variant.ranges.items():
        if name.endswith((".keys", ".values")):
            layer, part = name.split(".")
            place = f"{part[0]}_proj.{part[0]}_scale" if below_projections else f"{part[0]}_scale"
            tensors[f"model.layers.{layer}.self_attn.{place}"] = (amax / 448).reshape(1)
        elif largest < 0:
            tensors[f"{name.removesuffix('.weight')}.input_global_scale"] = (-largest / amax).reshape(1)
        else:
            tensors[f"{name.removesuffix('.weight')}.input_scale"] = (amax / largest).reshape(1)
    return tensors


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("schemes"))
    save_tiny(made.model, max_position_embeddings=CONTEXT, dtype=torch.float32, intermediate_size=128)
    return made


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture(scope="module")
def checkpoints(bench):
    """The folders by case; the run of the recipes that they are compared with is in the bench's own place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        alone = [recipe.partition("+")[0] for recipe in RECIPES]
        methods = ",".join(dict.fromkeys([*RECIPES, *alone]))
        assert bench.compare("--quiet", **FLAGS, methods=methods) == 0
    made = records(bench.out)
    folders = {}
    for case, (recipe, pack, config, largest) in CASES.items():
        weights = packers.quantized(bench.model, recipe.partition("+")[0].removeprefix("rtn:"), halved=False)
        variant = load_variant(bench.folder / "home" / "variants" / made[recipe]["key"])
        if not largest:
            assert not variant.ranges
        scales = scales_of(variant, largest, below_projections=case == "mo-fp8")
        parts = {name: pack(weight) for name, weight in weights.items()}
        folders[case] = packers.save_checkpoint(bench.model, bench.folder / case, config, parts, scales)
    return folders


@pytest.fixture(scope="module")
def out(bench, checkpoints):
    """A run of all of them with the default flags."""
    given = [word for name, folder in checkpoints.items() for word in ("--variant", f"{name}={folder}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        assert bench.compare("--quiet", *given, **FLAGS, methods=None, out=str(bench.folder / "theirs")) == 0
    return bench.folder / "theirs"


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_scored_whole_as_the_recipe_of_its_numbers(bench, out, case):
    recipe = CASES[case][0]
    assert kl(out, case) == pytest.approx(kl(bench.out, recipe), abs=1e-6, rel=1e-4)
    assert kl(out, case) > 1e-6
    assert abs(kl(out, case) - kl(out, f"{case}@weights")) > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_weights_alone_are_scored_beside_it(bench, out, case):
    alone = CASES[case][0].partition("+")[0]
    assert kl(out, f"{case}@weights") == pytest.approx(kl(bench.out, alone), abs=1e-6, rel=1e-4)


def test_the_record_says_the_parts_as_for_recipes(bench, out):
    ours, theirs = records(bench.out), records(out)
    for case, (recipe, *_) in CASES.items():
        for name in ("activations", "keys", "values", "bits per cached token"):
            assert theirs[case]["details"].get(name) == ours[recipe]["details"].get(name)
            assert name not in theirs[f"{case}@weights"]["details"]
        assert theirs[case]["key"] == theirs[f"{case}@weights"]["key"]
        assert theirs[f"{case}@weights"]["details"]["scored"] == f"its weights alone; {case} is all of it"
        assert "not rounded here" not in theirs[case]["details"]
        assert theirs[case]["parts"] == {"weights": f"{case}@weights"}
        assert (theirs[case]["role"], theirs[f"{case}@weights"]["role"]) == ("variant", "part")
    assert theirs["ct-fp8-static"]["details"]["scored"] == "as a whole: weights and activations and keys and values"
    page = (out / "report.md").read_text()
    assert "Bits/cached token" in page and "ct-fp8-static@weights" in page
    assert f"{len(CASES)} quantized variants of" in page
    assert not any(each["pareto"] for each in bench.report(out)["variants"] if each["role"] == "part")


def test_the_parts_are_a_choice(bench, checkpoints, out, tmp_path):
    given = ("--variant", f"it={checkpoints['ct-fp8-dynamic']}")
    for parts, twin in (("all", "ct-fp8-dynamic"), ("weights", "ct-fp8-dynamic@weights")):
        place = tmp_path / parts
        assert bench.compare("--quiet", *given, "--external-parts", parts, **FLAGS, methods=None, out=str(place)) == 0
        assert list(records(place)) == ["it"]
        assert kl(place, "it") == kl(out, twin)
    said = records(tmp_path / "weights")["it"]["details"]
    assert said["scored"] == "its weights alone, without rounded activations"
    assert "activations" not in said


def test_what_runs_weights_alone_names_the_flag(bench, checkpoints, out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qeval.compare.plan.kinds_of", lambda _: [])
    given = ("--variant", f"it={checkpoints['ct-fp8-dynamic']}")
    flags = ("--backend", "llama.cpp")
    assert bench.compare("--quiet", *given, *flags, **FLAGS, methods=None, out=str(tmp_path / "out")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{' '.join(flags)} runs weights alone, and activations are rounded too." in error
    assert "Give --external-parts weights" in error


@pytest.mark.parametrize("case", ["ct-fp8-dynamic", "mo-fp8"])
def test_a_streamed_model_scores_all_of_it_and_the_weights(bench, checkpoints, out, tmp_path, case):
    given = ("--variant", f"it={checkpoints[case]}", "--stream")
    assert bench.compare("--quiet", *given, **FLAGS, methods=None, out=str(tmp_path / "out")) == 0
    assert kl(tmp_path / "out", "it") == pytest.approx(kl(out, case), abs=1e-6)
    assert kl(tmp_path / "out", "it@weights") == pytest.approx(kl(out, f"{case}@weights"), abs=1e-6)


def test_what_is_not_rounded_is_a_warning_and_in_the_record(bench, checkpoints, tmp_path, capsys):
    folder = packers.save_checkpoint(checkpoints["ct-fp8-dynamic"], tmp_path / "theirs", None, {})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    settings["quantization_config"]["kv_cache_scheme"] = STATIC | {"type": "int"}
    (folder / "config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    assert bench.compare("--variant", f"it={folder}", **FLAGS, methods=None, out=str(out)) == 0
    heard = " ".join(capsys.readouterr().err.split())
    assert "it: its own configuration rounds more than is rounded here (inputs of 14 of 14 linears" in heard
    limits = records(out)["it"]["details"]["not rounded here"]
    assert "float8 by token with zero points" in limits
    assert "keys: int8-tensor, whose k_scale the file lacks in 2 of 2 layers" in limits
    assert list(records(out)) == ["it"]


def test_a_checkpoint_of_keys_and_values_alone_is_scored(bench, checkpoints, tmp_path, capsys):
    config = CT | {"format": "dense", "config_groups": {}, "kv_cache_scheme": STATIC}
    folder = packers.save_checkpoint(bench.model, tmp_path / "theirs", config, {})
    given = ("--variant", f"it={folder}")
    out = tmp_path / "out"
    assert bench.compare("--quiet", *given, **FLAGS, methods=None, out=str(out)) == 0
    assert list(records(out)) == ["it"]
    assert kl(out, "it") > 1e-7
    details = records(out)["it"]["details"]
    assert details["read as"] == "floats"
    assert details["scales"].startswith("the file has no k_scale in 2 of 2 layers: 1.0 there")
    capsys.readouterr()
    weights = {"out": str(tmp_path / "weights"), "methods": None}
    assert bench.compare("--quiet", *given, "--external-parts", "weights", **FLAGS, **weights) == 2
    assert "it holds no quantized weight, only rounded keys and values" in " ".join(capsys.readouterr().err.split())


def test_a_name_that_the_weights_would_have_is_refused(bench, checkpoints, tmp_path, capsys):
    folder = checkpoints["ct-fp8-dynamic"]
    given = ("--variant", f"it={folder}", "--variant", f"it@weights={folder}")
    assert bench.compare("--quiet", *given, **FLAGS, methods=None, out=str(tmp_path / "out")) == 2
    assert "Two variants are named 'it@weights'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("case", ["ct-fp8-dynamic", "ct-fp8-static"])
def test_logits_are_those_of_compressed_tensors_own_fake_quantization(bench, checkpoints, out, case):
    """Its `forward_quantize` rounds weights and inputs on the same scales; keys and values are rounded here alone."""
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    group = CASES[case][2]["config_groups"]["group_0"]
    strategy = "channel" if "channel" in CASES[case][0] else "tensor"
    group = group | {"weights": {"num_bits": 8, "type": "float", "strategy": strategy}}
    theirs = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32, attn_implementation="eager")
    apply_quantization_config(theirs, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    stored = load_file(checkpoints[case] / "model.safetensors")
    for name, module in theirs.named_modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = stored[f"{name}.weight_scale"].float().reshape(module.weight_scale.shape)
            if hasattr(module, "input_scale"):
                module.input_scale.data = stored[f"{name}.input_scale"].float()
            module.quantization_status = QuantizationStatus.FROZEN

    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32, attn_implementation="eager")
    variant = load_variant(bench.folder / "home" / "variants" / records(out)[case]["key"])
    variant = replace(variant, scheme=replace(variant.scheme, keys=None, values=None))
    ids = torch.arange(3, 43).reshape(1, -1)
    backend = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    ours = [_logits(backend, each, ids) for each in (variant, variant.weights_alone)]
    with torch.inference_mode():
        expected = theirs(ids).logits[0]
    distances = [float((each - expected).abs().max()) for each in ours]
    assert distances[0] < 1e-5
    assert distances[1] > 1e-3


def _logits(backend, variant, ids):
    request = Request(tuple(ids[0].tolist()), tuple(range(ids.shape[1])))
    with backend.open(variant) as session:
        return session.logits(session.states([request])[0])
