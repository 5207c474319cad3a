"""How a forward pass takes its keys and values, by the names of old and new releases of transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from qeval.models.silence_transformers import quiet
from qeval.models.structure.forward import FinalStates, body_of, cache_arguments, returned_cache, whole_pass
from qeval.models.tiny import tiny_config, tiny_model
from tests.fixtures.tiny import tiny_llama


def of_new_releases(input_ids: Any, cache: Any = None, use_cache: Any = None) -> None:
    """As transformers 5.24 writes it."""


def of_old_releases(input_ids: Any, past_key_values: Any = None, use_cache: Any = None, **others: Any) -> None:
    """As transformers 5.23 wrote it, and checkpoints' own code does."""


def of_no_use(input_ids: Any, cache: Any = None) -> None:
    """A cache that is read but never asked for."""


def of_none(input_ids: Any) -> None:
    """A model without a cache."""


@pytest.mark.parametrize(
    ("forward", "given", "without"),
    [
        (of_new_releases, {"cache": 7, "use_cache": True}, {"cache": None, "use_cache": False}),
        (of_old_releases, {"past_key_values": 7, "use_cache": True}, {"past_key_values": None, "use_cache": False}),
        (of_no_use, {"cache": 7}, {"cache": None}),
        (of_none, {}, {}),
    ],
)
def test_the_argument_is_called_what_the_forward_pass_calls_it(
    forward: Any, given: dict[str, Any], without: dict[str, Any]
) -> None:
    arguments = cache_arguments(forward)
    assert arguments(7) == given
    assert arguments(None) == without


def test_a_pass_that_hands_any_keyword_on_is_given_what_the_installed_release_takes() -> None:
    model = tiny_llama()
    cache = DynamicCache(config=model.config)

    def forward(input_ids: Any, **others: Any) -> Any:
        return model(input_ids=input_ids, **others)

    output = forward(model.dummy_inputs["input_ids"], **cache_arguments(forward)(cache))
    assert returned_cache(output) is cache
    assert cache.get_seq_length() == model.dummy_inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_of_an_output_is_found_by_either_name(name: str) -> None:
    assert returned_cache(SimpleNamespace(**{name: "keys and values"})) == "keys and values"


def test_an_output_without_a_cache_has_none() -> None:
    assert returned_cache(SimpleNamespace(cache=None)) is None


IDS = torch.tensor([[5, 9, 2, 44, 17]])


@pytest.mark.parametrize(
    ("model_type", "ends_in_body"),
    [("llama", True), ("bert", False), ("electra", False), ("inkling_text", False), ("llama4_text", True)],
)
def test_final_states_are_what_the_heads_matrix_multiplies(model_type: str, ends_in_body: bool) -> None:
    """BERT has a transform before its head, Inkling a scale; Llama 4's class names no body."""
    with quiet(), torch.inference_mode():
        model = tiny_model(tiny_config(model_type))
        logits, states = whole_pass(model, IDS)
        assert torch.equal(logits, model(input_ids=IDS, use_cache=False).logits[0])
        found = FinalStates(model)
        assert found.ends_in_body == ends_in_body
        assert torch.allclose(found(IDS)[0], states)
        head = model.get_output_embeddings()
        product = states @ head.weight.T + (0 if head.bias is None else head.bias)
        assert torch.allclose(product, logits, atol=1e-5)


def test_the_head_is_not_run_for_final_states(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet(), torch.inference_mode():
        model = tiny_model(tiny_config("bert"))
        states = FinalStates(model)
        before = states(IDS)
        monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda _: pytest.fail("the head ran"))
        assert torch.equal(states(IDS), before)
        assert body_of(model) is model.bert


def test_a_model_that_leaves_its_head_out_later_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet(), torch.inference_mode():
        model = tiny_model(tiny_config("bert"))
        states = FinalStates(model)
        monkeypatch.setattr(model, "forward", lambda **_: None)
        with pytest.raises(RuntimeError, match="BertLMHeadModel did not run its head"):
            states(IDS)
