"""What qeval can't do is said in one line before any work: by the configuration, or by tracing."""

from pathlib import Path
from types import SimpleNamespace

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
from qeval.models.structure.supported import (
    UNBOUNDED,
    check_model_type,
    check_supported,
    context_length,
    support_notes,
)
from qeval.quantize.build import build_variant, source_of
from qeval.types import Request
from tests.fixtures.families import FAMILIES, SIZES, tiny_family

REFUSED = {
    "CpmAnt": "attends to what stands behind a token too",
    "Gemma4UnifiedAssistant": "drafts for another model, whose keys and values it reads",
    "Musicgen": "continues several streams of codes of sound",
    "T5": "no causal language model",
}
TAKEN = (
    "Mamba",
    "Qwen3Next",
    "RecurrentGemma",
    "MiniMax",
    "DeepseekV32",
    "Blt",
    "Dory",
    "Gemma4Text",
    "Bart",
    "Bert",
    "Bloom",
    "XLNet",
)


@pytest.mark.parametrize(("name", "says"), REFUSED.items())
def test_a_configuration_that_cannot_be_scored_is_refused(name, says):
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(UsageError, match=rf"'here' names {config.model_type}, .*{says}"):
        check_supported(config, Path("here"))


@pytest.mark.parametrize("name", TAKEN)
def test_running_states_sparse_attention_and_layers_of_several_sizes_are_taken(name):
    check_supported(getattr(transformers, f"{name}Config")(), Path("here"))


def test_the_context_of_a_model_without_positions_has_no_end():
    for name in ("Mamba", "Bloom", "XLNet"):
        assert context_length(getattr(transformers, f"{name}Config")(), "here") == UNBOUNDED
    assert context_length(transformers.WhisperConfig(max_target_positions=77), "here") == 77
    with pytest.raises(UsageError, match="'here' names no context length"):
        context_length(SimpleNamespace(max_position_embeddings=None), "here")


SAVED_LATER, SAVED_BEFORE = "99.1.0", "4.30.0"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoConfig": "own.C"}},
            "names OwnForCausalLM, which needs Python code from its own repository, and qeval runs none",
        ),
        (
            {"model_type": "llamma"},
            "is of type 'llamma', which transformers .* does not have; the nearest .* is 'llama'",
        ),
        (
            {"model_type": "llamma", "transformers_version": SAVED_LATER},
            r"it was saved with 99\.1\.0, so install transformers 99\.1\.0 or newer",
        ),
        (
            {"model_type": "transfo-xl", "transformers_version": SAVED_BEFORE},
            r"any more: it was saved with 4\.30\.0, and types that were dropped since",
        ),
        (
            {"model_type": "no-such", "transformers_version": "\x1b[2J 9"},
            "is of type 'no-such', which .* does not have\\.$",
        ),
    ],
)
def test_a_type_that_transformers_lacks_is_refused_with_what_has_it(settings, says):
    with pytest.raises(UsageError, match=says):
        check_model_type(settings, "here")


@pytest.mark.parametrize("settings", [{"model_type": "llama"}, {"model_type": 5}, {}])
def test_a_type_that_transformers_has_or_judges_itself_is_left_to_it(settings):
    check_model_type(settings, "here")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_the_table_are_taken_without_a_word(name):
    model = tiny_family(name)
    check_supported(model.config, Path("here"))
    assert support_notes(model, describe_model(model)) == ()


def test_the_command_says_so_before_it_reads_a_weight(tmp_path, capfd):
    transformers.CpmAntConfig(architectures=["CpmAntForCausalLM"]).save_pretrained(tmp_path)
    for command in (
        ["compare", "--methods", "rtn", "--offline"],
        ["quantize", "--method", "rtn"],
        ["export", "--method", "rtn"],
    ):
        assert run_program([command[0], "--model", str(tmp_path), *command[1:]]) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: '{tmp_path / 'config.json'}' names CpmAntForCausalLM, which attends")
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
