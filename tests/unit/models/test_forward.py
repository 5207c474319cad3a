"""How a forward pass takes its keys and values, by the names of old and new releases of transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.cache_utils import DynamicCache

from qeval.models.structure.forward import cache_arguments, returned_cache
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
