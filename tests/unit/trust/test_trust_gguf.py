"""No number of another model from a GGUF file: every tensor and key is used, known to change nothing, or named."""

import gguf
import numpy as np
import pytest
import torch

from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from tests.fixtures.bench import Bench, kl
from tests.fixtures.gguf_families import FAMILIES, family_model, write_family
from tests.fixtures.tiny import byte_tokenizer, tiny_llama

IDS = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


def logits_of(path):
    with torch.inference_mode():
        return load_model(resolve(str(path))).model(IDS).logits


def refused(path):
    with pytest.raises(UsageError) as caught:
        load_model(resolve(str(path)))
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_logits_of_the_model_that_it_was_made_from(family, tmp_path):
    model = family_model(family)
    found = logits_of(write_family(tmp_path / "m.gguf", model, FAMILIES[family]))
    with torch.inference_mode():
        expected = model(IDS).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_positions_are_scaled(kind, tmp_path):
    model = tiny_llama(rope_parameters=ROPES[kind])
    found = logits_of(write_family(tmp_path / "m.gguf", model, "llama"))
    plain = tiny_llama()
    with torch.inference_mode():
        expected, other = model(IDS).logits, plain(IDS).logits
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - other).abs().max()) > 1e-2


def test_factors_that_are_no_rule_of_llama_3s_are_taken_as_they_are(tmp_path):
    model = tiny_llama()
    factors = np.linspace(1, 3, 8)
    found = logits_of(write_family(tmp_path / "m.gguf", model, "llama", tensors={"rope_freqs.weight": factors}))
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.div_(torch.from_numpy(factors).float())
    with torch.inference_mode():
        assert float((found - model(IDS).logits).abs().max()) < 1e-4


def test_biases_are_added(tmp_path):
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    found = logits_of(write_family(tmp_path / "m.gguf", model, "llama"))
    with torch.inference_mode():
        assert float((found - model(IDS).logits).abs().max()) < 1e-4


def test_a_bias_that_only_some_layers_have_is_zero_in_the_others(tmp_path):
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and name != "model.layers.0.self_attn.q_proj.bias":
                parameter.zero_()
    out = {f"blk.{layer}.attn_{part}.bias" for layer in (0, 1) for part in ("q", "k", "v", "output")}
    path = write_family(tmp_path / "m.gguf", model, "llama", leave_out=out - {"blk.0.attn_q.bias"})
    found = logits_of(path)
    with torch.inference_mode():
        assert float((found - model(IDS).logits).abs().max()) < 1e-4


def test_an_epsilon_is_the_number_that_was_written(tmp_path):
    model = tiny_llama(rms_norm_eps=1e-5)
    loaded = load_model(resolve(str(write_family(tmp_path / "m.gguf", model, "llama"))))
    assert loaded.model.config.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "blk.2.attn_q.weight"),
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.0.attn_sinks.weight"),
        ("qwen2", "blk.1.attn_output.bias"),
        ("qwen3", "blk.0.ffn_up.bias"),
        ("gemma2", "blk.0.attn_q_norm.weight"),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_named(architecture, name, tmp_path):
    family = next(family for family, each in FAMILIES.items() if each == architecture)
    extra = {name: np.ones(64, dtype=np.float32)}
    said = refused(write_family(tmp_path / "m.gguf", family_model(family), architecture, tensors=extra))
    assert f"holds tensors that are not read for the architecture {architecture} of 2 layers: {name}" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("logit_scale", 0.25),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("attn_logit_softcapping", 30.0),
        ("final_logit_softcapping", 30.0),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", True),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("a_key_of_tomorrow", 3),
    ],
)
def test_a_key_that_is_not_read_is_named(key, value, tmp_path):
    said = refused(write_family(tmp_path / "m.gguf", tiny_llama(), "llama", keys={key: value}))
    assert f"has the key llama.{key} = " in said
    assert "may change its numbers" in said


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope.dimension_count": 8}, "rotates 8 of the 16 numbers of a head"),
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "scales rotary positions by 'ntk'"),
        ({"rope.scaling.type": "longrope"}, "lacks rope_factors_short.weight or rope_factors_long.weight"),
        ({"attention.value_length": 8}, "values are of another length than its keys"),
        ({"vocab_size": 300}, "says 300 tokens where its embedding has 256 rows"),
        (
            {"feed_forward_length": 96},
            "holds model.layers.0.mlp.gate_proj.weight as [112, 64], its metadata asks for [96, 64]",
        ),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks the key llama.attention.layer_norm_rms_epsilon"),
        ({"attention.head_count_kv": [2, 4]}, "for each layer apart"),
        ({"expert_count": 4, "expert_used_count": 2}, "holds tensors that are not read for"),
    ],
)
def test_keys_that_the_tensors_or_the_model_contradict_are_refused(keys, says, tmp_path):
    assert says in refused(write_family(tmp_path / "m.gguf", tiny_llama(), "llama", keys=keys))


def test_more_layers_than_the_file_has_are_named(tmp_path):
    said = refused(write_family(tmp_path / "m.gguf", tiny_llama(), "llama", keys={"block_count": 3}))
    assert "lacks tensors that its model needs: model.layers.2." in said


def test_what_says_nothing_of_the_numbers_is_taken(tmp_path):
    keys = {"rope.scaling.finetuned": True, "expert_count": 0, "rope.scaling.type": "none", "vocab_size": 256}
    load_model(resolve(str(write_family(tmp_path / "m.gguf", tiny_llama(), "llama", keys=keys))))


def ids_of(path, text):
    return load_model(resolve(str(path))).tokenizer(text, add_special_tokens=False)["input_ids"]


def merged(*merges):
    """The bytes as tokens, and those of some merges."""
    vocab = byte_tokenizer().get_vocab()
    return [*sorted(vocab, key=vocab.get), *("".join(pair) for pair in merges)]


def write_merged(path, pre, *merges):
    """A file whose vocabulary has these merges."""
    tokens = merged(*merges)
    model = tiny_llama(vocab_size=len(tokens))
    before = gguf.GGUFWriter.add_token_merges
    gguf.GGUFWriter.add_token_merges = lambda self, _: before(self, [" ".join(pair) for pair in merges])
    try:
        return write_family(path, model, "llama", pre=pre, tokens=tokens)
    finally:
        gguf.GGUFWriter.add_token_merges = before


@pytest.mark.parametrize(
    ("pre", "text", "count"),
    [
        ("gpt-2", "1234", 2),  # any run of digits is one word: 12, 34
        ("smollm", "1234", 4),  # each digit is a word
        ("qwen2", "1234", 4),
        ("llama-bpe", "1234", 3),  # words of three digits: 12, 3, 4
        ("deepseek-v3", "1234", 3),
    ],
)
def test_text_is_cut_as_the_files_pre_tokenizer_says(pre, text, count, tmp_path):
    path = write_merged(tmp_path / "m.gguf", pre, ("1", "2"), ("3", "4"))
    assert len(ids_of(path, text)) == count


def test_a_pre_tokenizer_that_is_not_known_is_named(tmp_path):
    path = write_family(tmp_path / "m.gguf", tiny_llama(), "llama", pre="of-tomorrow")
    assert "cuts text by the pre-tokenizer 'of-tomorrow', which is not read" in refused(path)


def test_a_key_that_may_change_tokens_is_named(tmp_path):
    keys = {"tokenizer.ggml.normalizer": "NFKC"}
    path = write_family(tmp_path / "m.gguf", tiny_llama(), "llama", keys=keys)
    assert "has the key tokenizer.ggml.normalizer, which is not read" in refused(path)


def test_no_token_is_added_to_a_files_vocabulary_and_special_ones_stay_whole(tmp_path):
    tokens = [*merged(), "<|begin_of_text|>", "<think>"]
    model = tiny_llama(vocab_size=258)
    keys = {"tokenizer.ggml.bos_token_id": 256}
    path = write_family(
        tmp_path / "m.gguf", model, "llama", pre="llama-bpe", tokens=tokens, types=[1] * 256 + [3, 4], keys=keys
    )
    loaded = load_model(resolve(str(path)))
    assert len(loaded.tokenizer) == 258
    assert loaded.tokenizer("a<think>")["input_ids"] == [256, loaded.tokenizer.get_vocab()["a"], 257]
    assert loaded.info.notes[1:] == ()


@pytest.mark.parametrize("family", ["Llama", "Llama3", "Mistral", "Gemma2", "Qwen3Moe", "Phi4-mini"])
def test_a_folder_as_the_model_and_its_gguf_as_the_variant(family, tmp_path):
    bench = Bench(tmp_path)
    model = family_model(family)
    model.save_pretrained(tmp_path / "own")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    path = write_family(tmp_path / "m.gguf", model, FAMILIES[family])
    flags = ("--quiet", "--tasks", "kl,ppl", "--variant", f"q={path}")
    assert bench.compare(*flags, methods=None, model=str(tmp_path / "own"), out=str(tmp_path / "out")) == 0
    assert kl(tmp_path / "out", "q") < 1e-6


def test_a_gguf_with_other_rotary_positions_than_the_folders_is_refused(tmp_path, capsys):
    bench = Bench(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "own")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    path = write_family(tmp_path / "m.gguf", tiny_llama(), "llama", keys=keys)
    flags = ("--quiet", "--tasks", "kl", "--variant", f"q={path}")
    assert bench.compare(*flags, methods=None, model=str(tmp_path / "own"), out=str(tmp_path / "out")) == 2
    assert "its configuration has rope_parameters" in " ".join(capsys.readouterr().err.split())


def test_a_variant_whose_vocabulary_is_not_read_is_asked_the_baselines_tokens(tmp_path):
    bench = Bench(tmp_path)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "own")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    path = write_family(tmp_path / "m.gguf", model, "llama", pre="of-tomorrow")
    flags = ("--quiet", "--tasks", "kl", "--variant", f"q={path}")
    assert bench.compare(*flags, methods=None, model=str(tmp_path / "own"), out=str(tmp_path / "out")) == 0
    assert kl(tmp_path / "out", "q") < 1e-6


def test_an_adapter_as_a_gguf_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "holds no model but what its general.type calls 'adapter'" in refused(path)


def test_a_file_that_does_not_say_how_text_is_cut_is_told_of(tmp_path):
    loaded = load_model(resolve(str(write_family(tmp_path / "m.gguf", tiny_llama(), "llama", pre=None))))
    assert loaded.info.notes[1].startswith("The file does not say how text is cut before its vocabulary is applied")
