"""`export --to hf|gguf`: what is written is what is scored, bit for bit; what the form can't hold is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import qeval
from qeval.backends.llamacpp import gguf_writer
from qeval.backends.llamacpp.gguf_vocabulary import Vocabulary
from qeval.backends.torch import TorchBackend
from qeval.cli.app import run_program
from qeval.compare.loading import source_of_model
from qeval.compare.settings import ModelChoice
from qeval.formats import compressed_files
from qeval.jobs.publish import GGUF_FILE, VARIANT_MANIFEST
from qeval.models.gguf.convert import convert_gguf
from qeval.models.gguf.tokens import PRE_TOKENIZERS
from qeval.models.vocabulary import read_tokenizer
from qeval.paths import home as cache_folder
from qeval.score.token_hash import PROBES
from qeval.store.rows import RowStore
from qeval.store.seal import has_valid_seal
from qeval.store.variants import load_variant
from qeval.types import Request
from tests.fixtures.bench import CONTEXT, Bench, records
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import save_tiny, tiny_tokenizer

LINEARS = 14
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A model whose rows blocks of 32 divide, and its texts."""
    place = Bench(tmp_path_factory.mktemp("publish"))
    save_tiny(place.model, max_position_embeddings=CONTEXT, intermediate_size=128)
    return place


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture
def export(bench, tmp_path):
    """Exports the bench's model, and returns the folder and its manifest."""

    def make(method, to="hf", out=None, **keywords):
        shared = {"calibration": bench.seen, "calibration_samples": 4, "calibration_length": 32, "threads": 1}
        where = tmp_path / (out or method.replace(":", "_"))
        return qeval.export(str(bench.model), method=method, to=to, out=where, device="cpu", **shared, **keywords)

    return make


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def variant_of(manifest):
    return load_variant(cache_folder() / "variants" / manifest.variant_key)


def kl_rows(out, name):
    rows = RowStore(out).read("tokens").to_pylist()
    return [(row["window"], row["position"], row["kl_nats"]) for row in rows if row["variant"] == name]


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
    assert (manifest.matrices, manifest.floats, manifest.largest_difference) == (LINEARS, 7, 0.0)
    own, tensors = load_file(bench.model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(
        torch.equal(tensors[name], own[name]) and tensors[name].dtype == own[name].dtype
        for name in own.keys() & tensors.keys()
    )
    assert len(own.keys() & tensors.keys()) == 7


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
        ("rtn:int5-g32", "'rtn:int5-g32': int5-g32 is on 5 bits"),
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
        export("awq:int4-g32")


def test_a_tied_head_stays_in_float(bench, tmp_path):
    model = save_tiny(tmp_path / "tied", intermediate_size=128, tie_word_embeddings=True)
    with pytest.raises(qeval.UsageError, match="leave --quantize-head out"):
        qeval.export(str(model), method="rtn:int4-g32", to="hf", quantize_head=True, out=tmp_path / "out")
    folder, manifest = qeval.export(str(model), method="rtn:int4-g32", to="hf", out=tmp_path / "out")
    assert manifest.matrices == LINEARS
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_a_folder_that_is_there_is_refused_first(export, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(qeval.UsageError, match="exists; name another folder"):
        export("rtn:int4-g32", out="mine")


@pytest.mark.parametrize(
    ("form", "keywords", "flags"),
    [
        ("hf", {"exporter": "dynamo", "accuracy_level": 4}, "--exporter, --accuracy-level: not with --to hf"),
        ("gguf", {"ep": "cuda"}, "--ep: not with --to gguf"),
        ("onnx", {"compute": "bf16"}, "--compute: not with --to onnx"),
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


def blocks_of(tensor):
    """The scales and the codes of a Q4_0 or Q8_0 tensor, by ggml's definition of its blocks."""
    size = {"Q4_0": 18, "Q8_0": 34}[tensor.tensor_type.name]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, size)
    scales = blocks[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
    codes = blocks[:, 2:].view(np.int8).astype(int)
    if size == 18:
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(int) - 8
    return scales, codes


@pytest.mark.parametrize(
    ("method", "kind"),
    [("rtn:int4-g32-signed", "Q4_0"), ("gptq:int4-g64-signed-noclip", "Q4_0"), ("rtn:int8-g32-signed", "Q8_0")],
)
def test_a_gguf_file_holds_the_very_codes_and_scales(export, method, kind):
    folder, manifest = export(method, to="gguf")
    assert {path.name for path in folder.iterdir()} == {GGUF_FILE, "qeval.json", VARIANT_MANIFEST}
    assert (manifest.form, manifest.matrices, manifest.floats, manifest.largest_difference) == ("gguf", LINEARS, 7, 0)
    assert kind in manifest.layouts
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / GGUF_FILE).tensors}
    weight = variant_of(manifest).weights[f"{LAYER}.mlp.down_proj.weight"]
    scales, codes = blocks_of(tensors["blk.0.ffn_down.weight"])
    assert np.array_equal(codes.reshape(weight.codes.shape) + weight.grid.zero, weight.codes.numpy())
    repeated = weight.scales.repeat_interleave(weight.grid.block_size(128) // 32, dim=1)
    assert np.array_equal(scales.reshape(repeated.shape), repeated.numpy())


def test_a_gguf_file_is_scored_as_its_recipe_within_fp16(bench, export, tmp_path):
    folder, _ = export("rtn:int4-g32-signed", to="gguf")
    out, given = tmp_path / "out", f"file={folder / GGUF_FILE}"
    flags = {"methods": "rtn:int4-g32-signed", "tasks": "kl", "out": str(out)}
    assert bench.compare("--quiet", "--variant", given, **flags) == 0
    for ours, theirs in zip(kl_rows(out, "rtn:int4-g32-signed"), kl_rows(out, "file"), strict=True):
        assert theirs[2] == pytest.approx(ours[2], rel=0.02, abs=1e-4)


def test_the_float_model_goes_into_a_gguf_file_too(export):
    folder, manifest = export("float", to="gguf")
    assert (manifest.recipe, manifest.variant_key, manifest.matrices, manifest.floats) == (None, None, 0, LINEARS + 7)
    assert manifest.layouts == ["F16"]
    assert not (folder / VARIANT_MANIFEST).exists()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("rtn:int4-g32", "those of int4-g32 are not"),
        ("rtn:nf4", "No GGUF type spells nf4"),
        ("rtn:int8-g32-asym", "No GGUF type spells int8-g32-asym"),
        ("rtn:int4-g48-signed", "No GGUF type spells int4-g48-signed"),
        ("rtn:int4-g32-asym", "are no fp16 numbers"),
        ("awq:int4-g32-signed", "rtn:int4-g32-signed"),
        ("rtn:int4-g32-signed+kv-int8", "--to gguf writes weights alone"),
    ],
)
def test_what_no_gguf_type_holds_exactly_is_refused_with_what_one_does(export, tmp_path, method, says):
    with pytest.raises(qeval.UsageError) as caught:
        export(method, to="gguf", out="refused")
    assert says in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_a_gguf_file_with_other_codes_is_thrown_away(bench, tmp_path, monkeypatch, capsys):
    """Rows that were not turned into llama.cpp's order."""
    monkeypatch.setattr(gguf_writer, "_row_order", lambda name, config: None)
    out = tmp_path / "out"
    flags = ["--model", str(bench.model), "--method", "rtn:int4-g32-signed", "--to", "gguf", "--out", str(out)]
    assert run_program(["export", *flags, "--quiet"]) == 3
    assert "q_proj.weight than the variant; what was written is thrown away" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not out.exists()


def test_another_family_has_no_gguf_file(tmp_path):
    tiny_family("Gemma2", vocab_size=256).save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    with pytest.raises(qeval.UsageError, match="not of Gemma2ForCausalLM"):
        qeval.export(str(tmp_path / "gemma"), method="rtn:int4-g32-signed", to="gguf", out=tmp_path / "out")


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A Llama with a tokenizer as Llama 3's: its expressions, merges, a BOS in front, a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("tokenized"), intermediate_size=128, vocab_size=512)
    backend = Tokenizer(BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["llama-bpe"][0]), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    named = ["<|begin|>", "<|end|>"]
    how = trainers.BpeTrainer(vocab_size=500, special_tokens=named, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([" ".join(PROBES) * 3, "the quick brown fox 1234 don't " * 5], how)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=named[0], eos_token=named[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_the_tokenizer_and_the_chat_template_go_into_a_gguf_file(tokenized, tmp_path):
    how = {"method": "rtn:int4-g32-signed", "to": "gguf", "out": tmp_path / "out"}
    folder, manifest = qeval.export(str(tokenized), **how)
    assert manifest.contents[-1].startswith("With the tokenizer, which read back gives the model's token ids")
    own = read_tokenizer(tokenized)
    theirs = read_tokenizer(convert_gguf(folder / GGUF_FILE))
    for text in (*PROBES, "Antidisestablishmentarianism 12345"):
        assert theirs(text).input_ids == own(text).input_ids
    assert theirs.chat_template == own.chat_template
    assert (theirs.bos_token, theirs.eos_token) == (own.bos_token, own.eos_token)
    fields = gguf.GGUFReader(folder / GGUF_FILE).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == 512
    assert fields["tokenizer.ggml.pre"].contents() == "llama3"


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_left_out_and_told(export):
    folder, manifest = export("rtn:int4-g32-signed", to="gguf")
    assert manifest.contents[-1].startswith("Without a tokenizer, an engine is to be fed token ids: llama.cpp has no")
    assert gguf.GGUFReader(folder / GGUF_FILE).fields["tokenizer.ggml.model"].contents() == "none"


@pytest.mark.parametrize(
    ("step", "splits"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Digits(individual_digits=True), "smollm"),
        (pre_tokenizers.Punctuation(), None),
    ],
)
def test_what_cuts_text_is_named_or_refused(step, splits):
    backend = Tokenizer(BPE(vocab={"a": 0}, merges=[]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = step if splits == "gpt-2" else pre_tokenizers.Sequence([step, level])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if splits is None:
        with pytest.raises(qeval.UsageError, match="no name for what its tokenizer cuts text by"):
            Vocabulary(tokenizer, 1)
    else:
        assert Vocabulary(tokenizer, 1).pre == splits


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


def test_a_compute_type_that_rounds_the_checkpoint_makes_no_gguf_file(export):
    with pytest.raises(qeval.UsageError, match="rounds the checkpoint's float16"):
        export("rtn:int4-g32-signed", to="gguf", compute="bf16")
