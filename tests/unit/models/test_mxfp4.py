"""gpt-oss as it is published: experts in MXFP4, read as the baseline, in memory and by rows."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qeval.cli.app import run_program
from qeval.models.checkpoint.weight_map import map_weights
from qeval.models.checkpoint.weights import read_entries, weight_files
from qeval.models.load import load_model
from qeval.models.mxfp4 import dequantize_blocks
from qeval.models.silence_transformers import quiet
from qeval.models.source import resolve
from qeval.models.structure.weight_views import weights_of
from tests.fixtures.architectures import tiny_architecture
from tests.fixtures.tiny import tiny_tokenizer

STACK = "model.layers.0.mlp.experts.down_proj"


def packed(outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 124, (4, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny gpt-oss in the hub's layout, and the tensors of its one file."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    with quiet():
        model = tiny_architecture("GptOss", intermediate_size=96)
        model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: value.bfloat16() for name, value in model.state_dict().items()}
    for seed, name in enumerate([name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]):
        inputs, outputs = tensors.pop(name).shape[1:]
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(outputs, inputs, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tensors


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def test_values_are_those_of_transformers():
    blocks, scales = packed(16, 64, seed=9)
    found = dequantize_blocks(blocks, scales)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_the_published_checkpoint_is_the_baseline_and_a_note_says_what_it_was(published):
    folder, tensors = published
    with quiet():
        loaded = load_model(resolve(str(folder)))
    assert (loaded.info.weight_dtype, loaded.info.architecture) == ("bfloat16", "GptOssForCausalLM")
    (note,) = (note for note in loaded.info.notes if "MXFP4" in note)
    assert "dequantized to bfloat16: the baseline is that checkpoint" in note
    expected = convert_moe_packed_tensors(tensors[f"{STACK}_blocks"], tensors[f"{STACK}_scales"])
    assert torch.equal(loaded.model.get_parameter(STACK), expected.float())
    assert torch.equal(loaded.model.lm_head.weight, tensors["lm_head.weight"].float())

    # the same by rows, each expert as [outputs, inputs]
    with quiet():
        streamed = load_model(resolve(str(folder)), weightless=True)
    assert streamed.info.weights_sha256 == loaded.info.weights_sha256
    stored = map_weights(streamed.model, read_entries(weight_files(streamed.folder)), "here").stored
    for name, weight in weights_of(loaded.model).items():
        out = torch.empty(stored[name].shape)
        stored[name].decode(stored[name].fetch(0, stored[name].shape[0]), out)
        assert torch.equal(out, weight), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(f"{STACK}_scales"), f"holds {STACK}_blocks without {STACK}_scales"),
        (
            lambda tensors: tensors.update({f"{STACK}_scales": torch.zeros(4, 64, 2, dtype=torch.uint8)}),
            r"which U8 scales of \[4, 64, 2\] don't fit",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("_blocks")],
            r"quantized by mxfp4, but holds no tensors \*_blocks; take the float model",
        ),
    ],
)
def test_what_does_not_hold_together_is_refused_in_a_sentence(change, says, published, tmp_path, capfd):
    folder, tensors = published
    tensors = dict(tensors)
    change(tensors)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert run_program(["quantize", "--model", str(tmp_path), "--method", "rtn:g32", "--quiet"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert re.search(says, said)
