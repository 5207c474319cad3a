"""A recipe's parts: what each rounds alone, and under which name."""

import pytest

from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.recipe_files import load_recipes
from qeval.recipe_parts import added_parts, names_of_parts, split_recipe


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("int8-w8a8", {"weights": "rtn:int8-channel", "activations": "fp16+a-int8-token"}),
        ("rtn:fp8-tensor+a-fp8-static", {"weights": "rtn:fp8-tensor", "activations": "fp16+a-fp8-tensor"}),
        ("gptq:int4-g64+k-int4", {"weights": "gptq:int4-g64", "keys": "fp16+k-int4-token"}),
        ("awq+kv-int8", {"weights": "awq", "keys": "fp16+k-int8-token", "values": "fp16+v-int8-token"}),
        ("fp16+kv-q4_0-hadamard", {"keys": "fp16+k-q4_0-hadamard", "values": "fp16+v-q4_0-hadamard"}),
        # the scales that these fold into weights make the activations what they are
        ("awq:int4-g128+a-int8-token", {"weights": "awq:int4-g128"}),
        ("smoothquant", {"weights": "smoothquant:int8-channel"}),
        # and so does a rotation; that of heads changes values too
        ("quarot+a-int4+k-int8", {"weights": "quarot", "keys": "fp16+k-int8-token"}),
        (
            "rtn:int4-channel+r1+kv-int8",
            {"weights": "rtn:int4-channel+r1", "keys": "fp16+k-int8-token", "values": "fp16+v-int8-token"},
        ),
        ("rtn:int4-g128+r1r2r4", {}),
        ("rtn:int4-g128", {}),
        ("fp16+k-int8", {}),
    ],
)
def test_each_part_is_a_recipe_of_its_own(name, parts):
    found = split_recipe(parse_method(name))
    assert {part: recipe.name for part, recipe in found.items()} == parts
    for recipe in found.values():
        assert parse_method(recipe.name).identity() == recipe.identity()


def test_parts_are_scored_once_and_not_where_they_were_asked_for():
    recipes = [parse_method(name) for name in ("awq+kv-int8", "rtn+kv-int8", "rtn", "none+k-int8")]
    assert [recipe.name for recipe in added_parts(recipes)] == ["awq", "fp16+v-int8-token"]
    scored = (*recipes, *added_parts(recipes))
    assert names_of_parts(recipes[1], scored) == {
        "weights": "rtn",
        "keys": "none+k-int8",
        "values": "fp16+v-int8-token",
    }
    assert names_of_parts(recipes[1], recipes) == {"weights": "rtn", "keys": "none+k-int8"}


def test_a_recipe_of_a_file_keeps_its_options_and_names_its_weights(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(
        "variants:\n- {name: mine, method: 'rtn:int8-channel', rules: [{match: '*o_proj*', grid: float}], "
        "activations: int8, keys: int8}\n"
    )
    (recipe,) = load_recipes(path)
    parts = split_recipe(recipe)
    assert {part: each.name for part, each in parts.items()} == {
        "weights": "mine (weights)",
        "keys": "fp16+k-int8-token",
    }
    assert parts["weights"].rules == recipe.rules


def test_nothing_to_split_is_refused():
    with pytest.raises(UsageError, match="--split scores the parts of a recipe alone, and no recipe here"):
        added_parts([parse_method("awq"), parse_method("fp16+k-int8")])
