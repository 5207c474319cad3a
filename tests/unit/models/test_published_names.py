"""Checkpoints under the tensor names that publishers use: read whole and by rows, to the weights that were saved.

`save_pretrained` writes the names of the hub by transformers' own table, the other way round.
"""

import pytest
import torch

from qeval.models.checkpoint.weight_map import map_weights
from qeval.models.checkpoint.weights import read_entries, weight_files
from qeval.models.load import load_model
from qeval.models.silence_transformers import quiet
from qeval.models.source import resolve
from qeval.models.structure.weight_views import weights_of
from qeval.models.tiny import tiny_config, tiny_model
from tests.fixtures.architectures import ARCHITECTURES, tiny_architecture
from tests.fixtures.tiny import tiny_tokenizer

OTHER_NAMES = {
    "Jamba": "model.layers.1.feed_forward.experts.3.gate_proj.weight",
    "NemotronH": "backbone.layers.1.mixer.experts.3.up_proj.weight",
    "GraniteMoeHybrid": "model.layers.0.block_sparse_moe.input_linear.weight",
    "Qwen3Next": "model.layers.0.mlp.experts.3.gate_proj.weight",
    "KimiLinear": "model.layers.0.self_attn.q_conv1d.weight",
    "MiniMax": "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    "DeepseekV32": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "GlmMoeDsa": "model.layers.1.mlp.experts.3.gate_proj.weight",
}
"""A tensor of each that its model has under another name."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_in_the_layout_of_the_hub_is_read_whole_and_by_rows(name, tmp_path, monkeypatch):
    monkeypatch.setattr("qeval.models.load.check_supported", lambda *_: None)
    with quiet():
        model = tiny_architecture(name)
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        whole = load_model(resolve(str(tmp_path)))
    check_whole(model, whole.model)
    empty = load_model(resolve(str(tmp_path)), weightless=True)
    entries = read_entries(weight_files(tmp_path))
    if name in OTHER_NAMES:
        assert OTHER_NAMES[name] in {entry.name for entry in entries} - set(model.state_dict())
    check_rows(model, map_weights(empty.model, entries, "here").stored)


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta"])
def test_a_tied_head_that_is_listed_before_its_embedding_is_read(model_type, tmp_path):
    with quiet():
        model = tiny_model(tiny_config(model_type))
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        whole, empty = (load_model(resolve(str(tmp_path)), weightless=weightless) for weightless in (False, True))
    entries = read_entries(weight_files(tmp_path))
    assert "lm_head.decoder.weight" not in {entry.name for entry in entries}
    assert whole.info.tied_embeddings
    assert whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight
    check_whole(model, whole.model)
    check_rows(model, map_weights(empty.model, entries, "here").stored)


def check_whole(model, read):
    found = weights_of(read)
    for key, weight in weights_of(model).items():
        assert torch.equal(found[key], weight), key


def check_rows(model, stored):
    for key, weight in weights_of(model).items():
        part = stored[key]
        out = torch.empty(part.shape)
        part.decode(part.fetch(0, part.shape[0] if part.shape else 1), out)
        assert torch.equal(out, weight), key
