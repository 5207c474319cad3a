"""Rotated models in checkpoints and GGUF files: plain models that give the turned model's logits."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import qeval
from qeval.backends.torch import TorchBackend
from qeval.compare.loading import source_of_model
from qeval.compare.settings import ModelChoice
from qeval.jobs.publish import GGUF_FILE
from qeval.types import Request
from tests.fixtures.exports import FLOATS, LINEARS, variant_of
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

IDS = tuple(torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(0)).tolist())
SIGNED = "rtn:int4-g32-signed+r1r2"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied Llama in bf16, whose norms have gains."""
    folder = tmp_path_factory.mktemp("rotated")
    model = tiny_llama(intermediate_size=128, tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(torch.linspace(0.5, 2, len(parameter)))
    model.bfloat16().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        yield folder / "model"


def logits_in_torch(model, variant):
    """The fake-quantized model's own."""
    loaded, source = source_of_model(ModelChoice(str(model)))
    backend = TorchBackend(loaded.model, source.description, source.head, source.weight_dtype)
    with backend.open(variant) as session, torch.inference_mode():
        return session.logits(session.states([Request(IDS, tuple(range(len(IDS))))])[0])


@pytest.mark.parametrize("method", ["rtn:int4-g32+r1r2", "rtn:int8-w8a8+r2", "rtn:fp8+r1"])
def test_a_checkpoint_holds_the_turned_model(tied, tmp_path, method):
    folder, manifest = qeval.export(str(tied), method=method, to="hf", out=tmp_path / "out")
    variant, turned = variant_of(manifest), "r1" in method
    stored = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not turned
    assert ("lm_head.weight" in stored) is turned
    assert manifest.floats == FLOATS - 1 + turned

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    values = {name: tensor.float() for name, tensor in stored.items() if name in plain.state_dict()}
    values |= {name: weight.dequantize() for name, weight in variant.weights.items()}
    plain.load_state_dict(values, strict=turned)
    if variant.scheme.activations is None:
        with torch.inference_mode():
            found = plain(torch.tensor([IDS])).logits[0]
        assert (found - logits_in_torch(tied, variant)).abs().max() < 1e-4


def test_a_gguf_file_holds_the_turned_model_with_a_head_of_its_own(tied, tmp_path):
    folder, manifest = qeval.export(str(tied), method=SIGNED, to="gguf", compute="bf16", out=tmp_path / "out")
    assert (manifest.matrices, manifest.floats) == (LINEARS, FLOATS)
    variant = variant_of(manifest)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / GGUF_FILE).tensors}
    for theirs, ours in (("output.weight", "lm_head.weight"), ("token_embd.weight", "model.embed_tokens.weight")):
        values = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        assert torch.equal(torch.from_numpy(values.copy()), variant.floats[ours].float())
    assert not torch.equal(variant.floats["lm_head.weight"], variant.floats["model.embed_tokens.weight"])
    assert (tensors["output_norm.weight"].data == 1).all()


@pytest.mark.parametrize(
    ("method", "form", "says"),
    [
        ("rtn:int4-g32+r1r4", "hf", "turns inputs while running"),
        ("rtn:int4-g32-signed+r4", "gguf", "turns inputs while running"),
        (SIGNED, "gguf", "are no fp16 numbers"),  # turned in fp32
    ],
)
def test_what_a_form_cannot_hold_is_refused(tied, tmp_path, method, form, says):
    with pytest.raises(qeval.UsageError, match=says):
        qeval.export(str(tied), method=method, to=form, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
