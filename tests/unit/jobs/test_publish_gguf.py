"""`export --to gguf`: codes, scales and tokens are the variant's own, and what no type holds exactly is refused."""

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import qeval
from qeval.backends.llamacpp import gguf_writer
from qeval.backends.llamacpp.gguf_vocabulary import Vocabulary
from qeval.cli.app import run_program
from qeval.jobs.publish import GGUF_FILE, VARIANT_MANIFEST
from qeval.models.gguf.convert import convert_gguf
from qeval.models.gguf.tokens import PRE_TOKENIZERS
from qeval.models.vocabulary import read_tokenizer
from qeval.score.token_hash import PROBES
from tests.fixtures.exports import FLOATS, LAYER, LINEARS, export_bench, exporter, kl_rows, variant_of
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return export_bench(tmp_path_factory.mktemp("publish"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture
def export(bench, tmp_path):
    return exporter(bench, tmp_path, "gguf")


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
    [("rtn:int4-g32", "Q4_0"), ("gptq:int4-g64-noclip", "Q4_0"), ("rtn:int8-g32-signed", "Q8_0")],
)
def test_a_gguf_file_holds_the_very_codes_and_scales(export, method, kind):
    folder, manifest = export(method)
    assert {path.name for path in folder.iterdir()} == {GGUF_FILE, "qeval.json", VARIANT_MANIFEST}
    assert (manifest.form, manifest.matrices, manifest.floats, manifest.largest_difference) == (
        "gguf",
        LINEARS,
        FLOATS,
        0,
    )
    assert kind in manifest.layouts
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / GGUF_FILE).tensors}
    weight = variant_of(manifest).weights[f"{LAYER}.mlp.down_proj.weight"]
    scales, codes = blocks_of(tensors["blk.0.ffn_down.weight"])
    assert np.array_equal(codes.reshape(weight.codes.shape) + weight.grid.zero, weight.codes.numpy())
    repeated = weight.scales.repeat_interleave(weight.grid.block_size(128) // 32, dim=1)
    assert np.array_equal(scales.reshape(repeated.shape), repeated.numpy())


def test_a_gguf_file_is_scored_as_its_recipe_within_fp16(bench, export, tmp_path):
    folder, _ = export("rtn:int4-g32-signed")
    out, given = tmp_path / "out", f"file={folder / GGUF_FILE}"
    flags = {"methods": "rtn:int4-g32-signed", "tasks": "kl", "out": str(out)}
    assert bench.compare("--quiet", "--variant", given, **flags) == 0
    for ours, theirs in zip(kl_rows(out, "rtn:int4-g32-signed"), kl_rows(out, "file"), strict=True):
        assert theirs[2] == pytest.approx(ours[2], rel=0.02, abs=1e-4)


def test_the_float_model_goes_into_a_gguf_file_too(export):
    folder, manifest = export("float")
    assert (manifest.recipe, manifest.variant_key, manifest.matrices, manifest.floats) == (
        None,
        None,
        0,
        LINEARS + FLOATS,
    )
    assert manifest.layouts == ["F16"]
    assert not (folder / VARIANT_MANIFEST).exists()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("rtn:int4-g32-full", "those of int4-g32-full are not"),
        ("rtn:int8-g32", "those of int8-g32 are not"),
        ("rtn:nf4", "No GGUF type spells nf4"),
        ("rtn:int8-g32-asym", "No GGUF type spells int8-g32-asym"),
        ("rtn:int4-g48-signed", "No GGUF type spells int4-g48-signed"),
        ("rtn:int4-g32-asym", "are no fp16 numbers"),
        ("awq:int4-g32", "take rtn:int4-g32, rtn:int8-g32-signed or gptq:int4-g32-noclip"),
        ("rtn:int4-g32-signed+kv-int8", "--to gguf writes weights alone"),
    ],
)
def test_what_no_gguf_type_holds_exactly_is_refused_with_what_one_does(export, tmp_path, method, says):
    with pytest.raises(qeval.UsageError) as caught:
        export(method, out="refused")
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
    folder, manifest = export("rtn:int4-g32-signed")
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


def test_a_compute_type_that_rounds_the_checkpoint_makes_no_gguf_file(export):
    with pytest.raises(qeval.UsageError, match="rounds the checkpoint's float16"):
        export("rtn:int4-g32-signed", compute="bf16")
