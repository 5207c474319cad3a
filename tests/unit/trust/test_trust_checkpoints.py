"""No number of another model from a checkpoint: every tensor is used, known or named, whole and streamed alike."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import OPTConfig

from qeval.errors import UsageError
from qeval.models.checkpoint.weights import read_entries
from qeval.models.load import load_model
from qeval.models.source import resolve
from tests.fixtures.bench import Bench
from tests.fixtures.gguf_families import of_config
from tests.fixtures.tiny import byte_tokenizer, change_config, change_weights, save_tiny, tiny_llama, tiny_tokenizer

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "m", seed=2)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def loaded(request):
    """Loads a folder in one of the two ways."""
    return lambda folder: load_model(resolve(str(folder)), weightless=request.param)


def refused(loaded, folder):
    with pytest.raises(UsageError) as caught:
        loaded(folder)
    return str(caught.value)


def change_header(folder, change):
    """The header of the weights is another; the bytes stay."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int16, torch.int8])
def test_weights_that_are_no_floats_are_named(loaded, folder, dtype):
    def change(tensors):
        other = tensors[Q].view(dtype) if dtype == torch.int16 else tensors[Q].to(dtype)
        tensors[Q] = other

    change_weights(folder, change)
    assert f"holds {Q} as " in (said := refused(loaded, folder))
    assert "without what would say how to read that" in said


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_inv", "qzeros", "weight.absmax", "SCB"])
def test_scales_beside_floats_are_named(loaded, folder, leaf):
    name = Q.replace("weight", leaf) if "." not in leaf else f"{Q}.absmax"
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert f"codes or scales of quantized weights ({name})" in refused(loaded, folder)


def test_scales_of_activations_are_told_of_and_leave_the_weights(loaded, folder):
    name = Q.replace("weight", "input_scale")
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert loaded(folder).info.notes == (f"The model does not use some tensors of the checkpoint: {name}.",)


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_its_own(loaded, tmp_path):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    head = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).half()
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    found = loaded(folder)
    assert not found.info.tied_embeddings
    assert "config.json ties lm_head.weight to model.embed_tokens.weight" in found.info.notes[0]


def test_a_head_that_is_stored_twice_stays_tied(loaded, tmp_path):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    change_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    found = loaded(folder)
    assert found.info.tied_embeddings and found.info.notes == ()


def test_a_broken_tie_has_one_perplexity_whole_and_streamed(tmp_path):
    bench = Bench(tmp_path)
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    head = 0.1 * torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head.half()}))
    found = []
    for out, more in (("whole", ()), ("streamed", ("--stream",))):
        assert (
            bench.compare(
                "--quiet", "--tasks", "ppl", *more, methods="rtn:g32", model=str(folder), out=str(tmp_path / out)
            )
            == 0
        )
        found.append(bench.report(tmp_path / out)["baseline"]["metrics"]["ppl"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_two_models_in_one_folder_are_named(loaded, folder, tmp_path):
    tiny_llama(seed=3).half().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, folder)
    said = refused(loaded, folder)
    assert (
        "holds two models: model.safetensors, and model.safetensors.index.json with its shards (model-00001-of" in said
    )


def test_the_same_model_twice_and_an_index_of_shards_that_are_gone_are_taken(loaded, folder, tmp_path):
    model = load_model(resolve(str(folder))).model.half()
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, folder)
    before = loaded(folder).info
    next(folder.glob("model-00002*")).unlink()
    assert loaded(folder).info == before


def test_an_index_names_no_file_elsewhere(loaded, folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {Q: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not an index of safetensors files" in refused(loaded, folder)


def test_an_adapter_alone_is_named_with_its_base(loaded, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    about = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(about))
    assert "holds a PEFT adapter for org/base and no model: merge the two first" in refused(loaded, tmp_path / "a")


def test_an_adapter_as_a_variant_is_named(tmp_path, capsys):
    bench = Bench(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert bench.compare("--variant", f"lora={tmp_path / 'a'}", methods=None, out=str(tmp_path / "out")) == 2
    assert "holds a PEFT adapter for a model that it does not name" in " ".join(capsys.readouterr().err.split())


def test_an_adapter_beside_the_weights_is_not_applied_and_told_of(loaded, folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (note,) = loaded(folder).info.notes
    assert "An adapter lies beside the weights" in note


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: header[Q].update(dtype="F32"), "is F32 of [64, 64], but has 8192 bytes"),
        (lambda header: header[Q].update(shape=[64, 32]), "is F16 of [64, 32], but has 8192 bytes"),
        (lambda header: header[Q].update(shape=[-64, -64]), "has a size or place that is no whole number"),
        (lambda header: header[Q].update(dtype="Q4"), "none of safetensors'"),
        (lambda header: header[Q].update(data_offsets=[0, 8192]), "do not begin where those before it end"),
        (lambda header: header.pop(Q) and None, "do not begin where those before it end"),
        (lambda header: json.dumps(header)[:-1] + f', "{Q}": {json.dumps(header[Q])}}}', f"names {Q} twice"),
    ],
)
def test_a_header_that_its_bytes_contradict_is_refused(loaded, folder, change, says):
    change_header(folder, change)
    said = refused(loaded, folder)
    assert "is torn or not safetensors (" in said
    assert says in said


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": 400}, "asks for 400 layers, but it holds 21 tensors"),
        ({"hidden_size": 65536, "num_hidden_layers": 2}, "asks for hidden_size 65,536, which no tensor in it has"),
        ({"num_hidden_layers": 3}, "lacks tensors that its model needs: model.layers.2."),
        ({"intermediate_size": 10_000_000}, "its config.json asks for"),
        ({"vocab_size": 512}, "its config.json asks for [512, 64]"),
    ],
)
def test_sizes_that_the_file_contradicts_are_found_before_memory_is_taken(folder, values, says, monkeypatch):
    monkeypatch.setattr("qeval.models.load._read_model", lambda *_: pytest.fail("weights were read"))
    change_config(folder, **values)
    assert says in refused(lambda each: load_model(resolve(str(each))), folder)


def test_a_transposed_matrix_is_named(loaded, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert f"holds {name} as [64, 112]" in refused(loaded, folder)


def test_one_parameter_by_two_names_is_named(loaded, folder):
    other = torch.ones(64, 64).half()
    change_weights(folder, lambda tensors: tensors.update({Q.removeprefix("model."): other}))
    assert f"holds {Q} twice with other values" in refused(loaded, folder)


def test_a_tensor_in_two_shards_is_named(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="both hold the tensor"):
        read_entries([folder / "model.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_no_quantization_is_a_float_model(loaded, folder, key):
    change_config(folder, **{key: None})
    assert loaded(folder).info.weight_dtype == "float16"


@pytest.mark.parametrize("value", [{"quant_method": "awq"}, {}, [], "awq"])
def test_any_other_quantization_is_refused(loaded, folder, value):
    change_config(folder, quantization_config=value)
    said = refused(loaded, folder)
    assert "is quantized already (" in said or "config.json' can't be used: " in said


def test_weights_that_a_configuration_names_itself_are_not_followed(folder):
    other = {"weight": torch.ones(1)}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    before = load_model(resolve(str(folder))).model.state_dict()
    change_config(folder, transformers_weights="other.safetensors")
    after = load_model(resolve(str(folder))).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tokenizer_without_its_vocabulary_or_merges_is_refused(loaded, folder):
    (folder / "tokenizer.json").unlink()
    assert "is incomplete: there is neither tokenizer.json nor a vocabulary" in refused(loaded, folder)
    (folder / "vocab.json").write_text(json.dumps(byte_tokenizer().get_vocab()))
    assert "is incomplete: vocab.json lies there without merges.txt" in refused(loaded, folder)


def test_a_text_with_a_token_that_the_embedding_lacks_is_refused_and_others_are_scored(folder, tmp_path, capsys):
    bench = Bench(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    flags = {"methods": "rtn:g32", "model": str(folder), "out": str(tmp_path / "out")}
    assert bench.compare("--quiet", "--tasks", "ppl", **flags) == 0
    (tmp_path / "image.txt").write_text("the <image> of a cat. " * 40)
    flags = {**flags, "out": str(tmp_path / "other"), "corpus": str(tmp_path / "image.txt")}
    assert bench.compare("--quiet", "--tasks", "ppl", **flags) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "The text 'image.txt' holds the token <image> (id 256), but the model's embedding has 256 rows" in said


def test_embeddings_narrower_than_the_layers_are_streamed(tmp_path):
    """OPT-350m's layout."""
    bench = Bench(tmp_path)
    sizes = {"vocab_size": 256, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 256}
    of_config(
        OPTConfig(**sizes, **ids, word_embed_proj_dim=32, do_layer_norm_before=False, init_std=0.15)
    ).save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    found = []
    for out, more in (("whole", ()), ("streamed", ("--stream",))):
        flags = {"methods": "rtn:g32", "model": str(tmp_path / "opt"), "out": str(tmp_path / out)}
        assert bench.compare("--quiet", "--tasks", "ppl", *more, **flags) == 0
        found.append(bench.report(tmp_path / out)["baseline"]["metrics"]["ppl"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
