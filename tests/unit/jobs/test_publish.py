"""`export --to hf`: what is written is what is scored, bit for bit, and what the form can't hold is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import qeval
from qeval.backends.torch import TorchBackend
from qeval.cli.app import run_program
from qeval.compare.loading import source_of_model
from qeval.compare.settings import ModelChoice
from qeval.formats import compressed_files
from qeval.jobs.publish import VARIANT_MANIFEST
from qeval.store.seal import has_valid_seal
from qeval.types import Request
from tests.fixtures.bench import records
from tests.fixtures.exports import FLOATS, LAYER, LINEARS, export_bench, exporter, kl_rows, variant_of
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import change_config, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return export_bench(tmp_path_factory.mktemp("publish"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture
def export(bench, tmp_path):
    return exporter(bench, tmp_path, "hf")


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("methods", "rounds"),
    [
        (
            ("rtn:int4-g32", "awq:int4-g32-fold", "gptq:int4-g32-asym", "mixed-rtn:int4-g32", "rtn:fp8", "rtn:mxfp4"),
            0.0,
        ),
        (("nvfp4",), 1e-6),
    ],
)
def test_an_exported_folder_is_scored_as_its_recipe(bench, export, tmp_path, methods, rounds):
    folders = {f"hf{index}": export(method).folder for index, method in enumerate(methods)}
    given = [word for name, folder in folders.items() for word in ("--variant", f"{name}={folder}")]
    out = tmp_path / "out"
    assert bench.compare("--quiet", *given, methods=",".join(methods), tasks="kl", out=str(out)) == 0
    for name, method in zip(folders, methods, strict=True):
        ours, theirs = kl_rows(out, method), kl_rows(out, name)
        assert len(ours) > 100
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        assert all(abs(a[2] - b[2]) <= rounds for a, b in zip(ours, theirs, strict=True))
    assert records(out)["hf0"]["method"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("method", "says"), [("rtn:int4-g32", True), ("rtn:int4-g32-full", False), ("rtn:int8-channel", False)]
)
def test_negative_scales_are_told_with_the_grid_that_has_none(export, method, says):
    folder, manifest = export(method)
    stored = load_file(folder / "model.safetensors")
    negative = [name for name, part in stored.items() if name.endswith("weight_scale") and bool((part < 0).any())]
    assert bool(negative) is says
    assert any("take a -full grid, such as int4-g128-full" in line for line in manifest.contents) is says


def test_a_folder_holds_a_plain_model_and_says_what_it_is(bench, export):
    folder, manifest = export("rtn:int4-g32-asym")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "qeval.json", VARIANT_MANIFEST,
    }  # fmt: skip
    assert quantization(folder) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "dynamic": False, "symmetric": False, "num_bits": 4, "type": "int", "strategy": "group",
                    "group_size": 32,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }  # fmt: skip
    assert json.loads((folder / "qeval.json").read_text()) == manifest.model_dump()
    assert (manifest.matrices, manifest.floats, manifest.largest_difference) == (LINEARS, FLOATS, 0.0)
    own, tensors = load_file(bench.model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(
        torch.equal(tensors[name], own[name]) and tensors[name].dtype == own[name].dtype
        for name in own.keys() & tensors.keys()
    )
    assert len(own.keys() & tensors.keys()) == FLOATS


def test_no_path_of_the_machine_is_written(bench, export):
    folder, _ = export("gptq:int4-g32")
    for name in ("qeval.json", VARIANT_MANIFEST):
        assert str(bench.folder) not in (folder / name).read_text()
    assert has_valid_seal(json.loads((folder / VARIANT_MANIFEST).read_text()))


def test_a_mix_names_the_modules_of_each_width(export):
    folder, _ = export("mixed-rtn:int4-g32")
    groups = quantization(folder)["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    targets = [name for group in groups for name in group["targets"]]
    assert len(targets) == len(set(targets)) == LINEARS
    assert f"{LAYER}.self_attn.q_proj" in targets


def test_what_was_folded_into_norms_is_written(bench, export):
    folder, manifest = export("smoothquant:int8-w8a8")
    variant, tensors = variant_of(manifest), load_file(folder / "model.safetensors")
    own = load_file(bench.model / "model.safetensors")
    assert variant.floats
    for name, value in variant.floats.items():
        assert torch.equal(tensors[name].float(), value.float())
        assert not torch.equal(tensors[name].float(), own[name].float())
    (group,) = quantization(folder)["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert group["input_activations"]["strategy"] == "token"


def test_static_scales_of_inputs_and_of_the_cache_are_written(export):
    folder, manifest = export("rtn:fp8+a-fp8-static+kv-fp8-static")
    ranges, tensors = variant_of(manifest).ranges, load_file(folder / "model.safetensors")
    assert float(tensors[f"{LAYER}.mlp.up_proj.input_scale"]) == pytest.approx(
        float(ranges[f"{LAYER}.mlp.up_proj.weight"]) / 448
    )
    assert float(tensors[f"{LAYER}.self_attn.k_scale"]) == pytest.approx(float(ranges["0.keys"]) / 448)
    assert float(tensors["model.layers.1.self_attn.v_scale"]) == pytest.approx(float(ranges["1.values"]) / 448)
    assert quantization(folder)["kv_cache_scheme"]["strategy"] == "tensor"
    assert sum(name.endswith("input_scale") for name in tensors) == LINEARS


def test_a_head_of_its_own_is_written_too(export):
    folder, manifest = export("rtn:int4-g32", out="head", quantize_head=True)
    assert manifest.matrices == LINEARS + 1
    assert quantization(folder)["ignore"] == []
    assert "lm_head.weight_packed" in load_file(folder / "model.safetensors")


def test_the_head_of_a_model_with_rounded_activations_has_a_group_of_its_own(export):
    folder, _ = export("rtn:int8-w8a8", out="head", quantize_head=True)
    groups = quantization(folder)["config_groups"].values()
    assert {group["format"]: group["input_activations"] is None for group in groups} == {
        "int-quantized": False, "pack-quantized": True,
    }  # fmt: skip
    assert quantization(folder)["format"] == "mixed-precision"


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("rtn:int5-g32", "'rtn:int5-g32': int5-g32-signed is on 5 bits"),
        ("rtn:nf4", "no layout in compressed-tensors"),
        ("rtn:int4-g48", "short block"),
        ("rtn:int4-g32+kv-int8", "take +kv-fp8-tensor"),
        ("fp16+kv-fp8-static", "leaves the weights in float"),
        ("float", "--method float leaves nothing to write"),
    ],
)
def test_what_a_checkpoint_cant_say_is_refused_before_work(export, tmp_path, method, says):
    with pytest.raises(qeval.UsageError) as caught:
        export(method, out="refused")
    assert says in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_awq_that_folds_alone_multiplies_nothing_while_running(export):
    folder, manifest = export("awq:int4-g32-fold")
    variant = variant_of(manifest)
    assert not variant.input_scales
    assert variant.details["input scales"].endswith(" groups scaled, 0 of them on the input explicitly")
    assert {f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"} <= variant.floats.keys()
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[name].float(), value.float()) for name, value in variant.floats.items())


def test_an_input_that_is_scaled_while_running_is_refused(export):
    with pytest.raises(qeval.UsageError, match=r"multiplies the input of .*o_proj.*add fold to the recipe"):
        export("awq:int4-g32-full")


def test_a_tied_head_stays_in_float(bench, tmp_path):
    model = save_tiny(tmp_path / "tied", intermediate_size=128, tie_word_embeddings=True)
    with pytest.raises(qeval.UsageError, match="leave --quantize-head out"):
        qeval.export(str(model), method="rtn:int4-g32", to="hf", quantize_head=True, out=tmp_path / "out")
    folder, manifest = qeval.export(str(model), method="rtn:int4-g32", to="hf", out=tmp_path / "out")
    assert manifest.matrices == LINEARS
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "says"),
    [("Mixtral", "is an expert in a stack"), ("GPT2", "is no matrix of a Linear module")],
)
def test_matrices_that_lie_otherwise_are_refused(tmp_path, family, says):
    tiny_family(family, vocab_size=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(qeval.UsageError, match=says):
        qeval.export(str(tmp_path / "model"), method="rtn:int4-channel", to="hf", out=tmp_path / "out")


def test_code_beside_the_weights_stays_there(tmp_path):
    model = save_tiny(tmp_path / "model", intermediate_size=128)
    change_config(model, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (model / "modeling.py").write_text("raise SystemExit\n")
    folder, _ = qeval.export(str(model), method="rtn:int4-g32", to="hf", out=tmp_path / "out")
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert not [*folder.glob("*.py")]


def test_a_folder_that_is_there_is_refused_first(export, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(qeval.UsageError, match="exists; name another folder"):
        export("rtn:int4-g32", out="mine")


@pytest.mark.parametrize(
    ("form", "keywords", "flags"),
    [
        ("hf", {"exporter": "dynamo", "accuracy_level": 4}, "--exporter, --accuracy-level: not with --to hf"),
        ("gguf", {"ep": "cuda"}, "--ep: not with --to gguf"),
        ("onnx", {"compute": "bf16", "run": "r"}, "--compute, --run: not with --to onnx"),
        ("exl3", {}, "Unknown form 'exl3'"),
    ],
)
def test_flags_of_another_form_are_refused(export, form, keywords, flags):
    with pytest.raises(qeval.UsageError) as caught:
        export("rtn:int4-g32", to=form, **keywords)
    assert flags in str(caught.value)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_what_is_read_back_as_something_else_is_thrown_away(bench, tmp_path, monkeypatch, capsys, part):
    """One bit of one matrix."""
    compress = compressed_files.compress_weight

    def wrong(weight, layout):
        parts = {name: tensor.clone() for name, tensor in compress(weight, layout).items()}
        if weight.codes.shape == (128, 64):
            parts[part].view(torch.int32)[3, 1] ^= 1
        return parts

    monkeypatch.setattr(compressed_files, "compress_weight", wrong)
    out = tmp_path / "out"
    flags = ["--model", str(bench.model), "--method", "rtn:int4-g32", "--to", "hf", "--out", str(out)]
    assert run_program(["export", *flags, "--quiet"]) == 3
    assert "as it was made; what was written is thrown away" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_the_card_of_the_run_that_scored_it_lies_beside_it(bench, export, tmp_path):
    out = tmp_path / "run"
    assert bench.compare("--quiet", methods="rtn:int4-g32,rtn:fp8", tasks="kl", out=str(out)) == 0
    folder, _ = export("rtn:int4-g32", run=out)
    card = (folder / "README.md").read_text()
    assert "model-index" in card and "rtn:int4-g32" in card
    assert str(bench.folder) not in card
    with pytest.raises(
        qeval.UsageError, match=r"scored no variant that is this rtn:int8-channel.*rtn:int4-g32, rtn:fp8"
    ):
        export("rtn:int8-channel", run=out)
    with pytest.raises(qeval.UsageError, match="--run is for variants"):
        export("float", to="gguf", run=out)
    with pytest.raises(qeval.UsageError, match="holds no run"):
        export("rtn:fp8", run=tmp_path / "nowhere")


def test_the_command_says_what_it_wrote(bench, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", str(bench.model), "--method", "rtn:int4-g32", "--to", "hf", "--out", str(out)]
    assert run_program(["export", *flags]) == 0
    heard = " ".join(capsys.readouterr().err.split())
    assert f"{LINEARS} matrices in compressed-tensors' pack-quantized; read back, they are bit for bit" in heard


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method",
    ["rtn:int4-g32", "awq:int4-g32-fold", "gptq:int4-g32-asym", "rtn:int8-channel", "rtn:fp8", "rtn:mxfp4"],
)
def test_transformers_loads_the_same_model(bench, export, method):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder, manifest = export(method)
    variant, ours = variant_of(manifest), AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    for name, weight in variant.weights.items():
        ours.get_parameter(name).data.copy_(weight.dequantize())
    for name, value in variant.floats.items():
        ours.get_parameter(name).data.copy_(value)
    how = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    ids = torch.arange(3, 200, 5).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["rtn:fp8-w8a8", "rtn:fp8+a-fp8-static"])
def test_compressed_tensors_rounds_fp8_activations_as_qeval(bench, export, method):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    folder, manifest = export(method)
    loaded, source = source_of_model(ModelChoice(name=str(bench.model)))
    backend, ids = TorchBackend(loaded.model, source.description, source.head, source.weight_dtype), tuple(range(3, 99))
    with backend.open(variant_of(manifest)) as session:
        ours = session.logits(session.states([Request(ids, tuple(range(len(ids))))])[0])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, rtol=0, atol=1e-5)
