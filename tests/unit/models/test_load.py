"""Loading a checkpoint folder: what comes back, and a sentence for everything that may be wrong with one."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig

from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from tests.fixtures.tiny import change_config, change_weights, save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "m", seed=2, bos=True)


def load_folder(folder, **options):
    return load_model(resolve(str(folder)), **options)


def test_half_precision_weights_are_computed_in_fp32_on_the_cpu(folder):
    loaded = load_folder(folder)
    expected = tiny_llama(seed=2)
    for parameter in expected.parameters():
        parameter.data = parameter.data.half().float()
    tokens = torch.tensor([[1, 7, 30, 5]])
    assert torch.equal(loaded.model(tokens).logits, expected(tokens).logits)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"


def test_what_is_known_of_a_model(folder):
    info = load_folder(folder).info
    assert (info.name, info.source, info.hub_id, info.revision) == (str(folder), "folder", None, None)
    assert (info.architecture, info.weight_dtype, info.compute_dtype) == ("LlamaForCausalLM", "float16", "float32")
    assert (info.layers, info.hidden_size, info.vocab_size, info.context_length) == (2, 64, 256, 256)
    assert info.parameters == sum(p.numel() for p in tiny_llama().parameters())
    assert (info.tied_embeddings, info.notes) == (False, ())
    assert len(info.weights_sha256) == 64
    assert load_folder(folder).info == info


def test_a_tied_head_is_counted_once_and_is_not_missing(tmp_path):
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    loaded = load_folder(tied)
    assert loaded.info.tied_embeddings
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.info.parameters == sum(p.numel() for p in tiny_llama().parameters()) - 256 * 64


def test_a_dtype_that_is_asked_for_is_used(folder):
    loaded = load_folder(folder, dtype="bfloat16")
    assert loaded.info.compute_dtype == "bfloat16"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="Unknown dtype 'bf16'; nearest: bfloat16"):
        load_folder(folder, dtype="bf16")


def test_loading_says_nothing_of_its_own(folder, capfd):
    load_folder(folder)
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_config_or_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no tokenizer"):
        load_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"there is no config\.json in it"):
        load_folder(folder)


def test_a_torn_tokenizer_or_config_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UsageError, match=r"tokenizer in .* can't be read"):
        load_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json' is not valid JSON"):
        load_folder(folder)


def test_a_tensor_that_the_checkpoint_lacks_is_named(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        UsageError, match=r"lacks tensors that its model needs: model\.layers\.1\.mlp\.up_proj\.weight\."
    ):
        load_folder(folder)


def test_an_untied_head_that_the_checkpoint_lacks_is_not_made_up(folder):
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UsageError, match=r"lacks tensors that its model needs: lm_head\.weight"):
        load_folder(folder)


def test_tensors_that_the_model_does_not_use_are_noted(folder):
    change_config(folder, num_hidden_layers=1)
    (note,) = load_folder(folder).info.notes
    assert "does not use some tensors of the checkpoint: model.layers.1." in note


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"][3, 5] = value

    change_weights(folder, spoil)
    with pytest.raises(
        UsageError, match=r"model\.layers\.0\.self_attn\.k_proj\.weight holds 1 values that are not finite"
    ):
        load_folder(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    change_config(folder, intermediate_size=96)
    with pytest.raises(UsageError, match=r"holds .*proj.weight as \[.*112.*\], its config.json asks for \[.*96.*\]"):
        load_folder(folder)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_told_of(folder):
    tiny_tokenizer(vocab_size=300).save_pretrained(folder)
    (note,) = load_folder(folder).info.notes
    assert "beyond the embedding's 256 rows: <filler_256> (256), <filler_257> (257)" in note


def test_a_folder_that_only_model_optimizers_own_file_calls_quantized_is_refused(folder):
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is quantized already \(modelopt\)"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "nonsense"}, "is of type 'nonsense', which transformers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized already \(gptq\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
    ],
)
def test_a_config_that_is_no_float_language_model_is_refused(folder, values, says):
    change_config(folder, **values)
    with pytest.raises(UsageError, match=says):
        load_folder(folder)


def test_an_encoder_is_refused(folder):
    BertConfig(architectures=["BertModel"]).save_pretrained(folder)
    with pytest.raises(UsageError, match="names BertModel, which is no causal language model"):
        load_folder(folder)


def test_code_that_comes_with_a_model_is_not_run(folder):
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UsageError, match="needs Python code from its own repository"):
        load_folder(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="as pickles only"):
        load_folder(folder)
