"""What qeval can't do is said in one line before any work: by the configuration, or by tracing."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qeval.backends.torch import TorchBackend, TorchSession
from qeval.cli.app import run_program
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.supported import check_supported, support_notes
from qeval.quantize.build import build_variant, source_of
from qeval.types import Request
from tests.fixtures.families import FAMILIES, SIZES, tiny_family

STATEFUL = "keep a running state in the place of each token's keys and values"
REFUSED = {
    "Mamba": STATEFUL,
    "Jamba": STATEFUL,
    "Qwen3Next": STATEFUL,
    "Zamba2": STATEFUL,
    "RecurrentGemma": STATEFUL,
    "MiniMax": STATEFUL,
    "Bart": "an encoder with a decoder",
    "T5": "no causal language model",
}


@pytest.mark.parametrize(("name", "says"), REFUSED.items())
def test_a_configuration_that_cannot_be_scored_is_refused(name, says):
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(UsageError, match=rf"'here' names {config.model_type}, .*{says}"):
        check_supported(config, Path("here"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_the_table_are_taken_without_a_word(name):
    model = tiny_family(name)
    check_supported(model.config, Path("here"))
    assert support_notes(model, describe_model(model)) == ()


def test_the_command_says_so_before_it_reads_a_weight(tmp_path, capfd):
    transformers.MambaConfig(architectures=["MambaForCausalLM"]).save_pretrained(tmp_path)
    for command in (
        ["compare", "--methods", "rtn", "--offline"],
        ["quantize", "--method", "rtn"],
        ["export", "--method", "rtn"],
    ):
        assert run_program([command[0], "--model", str(tmp_path), *command[1:]]) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: '{tmp_path / 'config.json'}' names MambaForCausalLM, whose layers")
        assert said.count("\n") == 1


def of_config(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_a_model_whose_experts_are_multiplied_in_another_way_is_refused(monkeypatch):
    monkeypatch.setattr("qeval.models.structure.weight_views._PRODUCTS", ())  # none that is watched
    model = tiny_family("Mixtral")
    with pytest.raises(UsageError, match=r"8\d% of the weights in MixtralForCausalLM's decoder layers are in modules"):
        support_notes(model, describe_model(model))


def test_a_model_that_gives_no_hidden_states_is_refused(monkeypatch):
    model = tiny_family("Llama")

    def fail(*_, **__):
        raise TypeError("images are missing.\nsecond line")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(UsageError, match=r"final hidden states for tokens alone \(TypeError: images are missing\)"):
        describe_model(model)


def gemma3_with_images():
    text = {name: value for name, value in SIZES.items() if name != "attn_implementation"}
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,  # as many as the text has
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {"image_token_index": 255, "boi_token_index": 254, "eoi_token_index": 253, "mm_tokens_per_image": 4}
    return transformers.Gemma3Config(text_config={**text, **windows}, vision_config=vision, **ids)


def test_the_language_model_of_one_that_takes_images_is_scored_and_the_rest_stays_in_float():
    model = of_config(gemma3_with_images())
    description = describe_model(model)
    assert description.layers == ("model.language_model.layers.0", "model.language_model.layers.1")
    (note,) = support_notes(model, description)
    assert "its language model of 2 layers alone is scored and quantized, and the 43,600 parameters beside it" in note
    head = head_of(model)
    variant = build_variant(
        source_of(model, description, head, (), {}), parse_method("rtn:g32"), "key", lambda done: None
    )
    assert len(variant.weights) == 14
    assert any("vision_tower" in each.name for each in variant.kept)
    backend = TorchBackend(model, description, head, torch.float32)
    ids = tuple(range(1, 40))
    with backend.open(variant) as session:
        assert isinstance(session, TorchSession)
        whole = session.states([Request(ids, tuple(range(20, 39)))])[0]
        shared = session.states([Request(ids[20:], tuple(range(19)))], session.prefill(ids[:20]))[0]
        assert float((whole - shared).abs().max()) < 1e-4
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    with backend.open(None) as session:
        found = session.logits(session.states([Request(ids, tuple(range(39)))])[0])
    assert float((found - expected).abs().max()) < 1e-4
