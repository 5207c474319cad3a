"""Recipes from names and from YAML: what they mean, what is refused, and that the shipped ones are sound."""

import dataclasses
from pathlib import Path

import pytest

from qeval.config import (
    METHODS,
    Defaults,
    Recipe,
    Rule,
    check_distinct,
    load_recipes,
    parse_budget,
    parse_method,
    parse_methods,
)
from qeval.errors import UsageError
from qeval.paths import shipped
from qeval.quant.grid import parse

NAMES = {
    "rtn": Recipe("rtn", "rtn"),
    "awq": Recipe("awq", "awq"),
    " rtn:int8-channel ": Recipe("rtn:int8-channel", "rtn", "int8-channel"),
    "awq:g32-asym": Recipe("awq:g32-asym", "awq", "g32-asym"),
    "awq:noclip": Recipe("awq:noclip", "awq", clip=False),
    "rtn:int3-clip-g64": Recipe("rtn:int3-clip-g64", "rtn", "int3-g64", clip=True),
    "rtn:head": Recipe("rtn:head", "rtn", quantize_head=True),
    "mixed:4.8bpw": Recipe("mixed:4.8bpw", "mixed", budget=4.8),
    "mixed-rtn:g32-6bpw": Recipe("mixed-rtn:g32-6bpw", "mixed-rtn", "g32", budget=6.0),
    "mixed:positional": Recipe("mixed:positional", "mixed", importance="positional"),
    "gptq": Recipe("gptq", "gptq"),
    "gptq:int8-channel-noactorder": Recipe("gptq:int8-channel-noactorder", "gptq", "int8-channel", act_order=False),
    "gptq:g32-damp0.05-clip": Recipe("gptq:g32-damp0.05-clip", "gptq", "g32", clip=True, damping=0.05),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_a_recipe(name):
    assert parse_method(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "clips", "calibrated", "uses_awq"),
    [
        ("rtn", False, False, False),
        ("rtn:clip", True, False, False),
        ("awq", True, True, True),
        ("awq:noclip", False, True, True),
        ("mixed", True, True, True),
        ("mixed:positional", True, True, True),
        ("mixed-rtn", False, True, False),
        ("mixed-rtn:positional", False, False, False),
        ("gptq", True, True, False),
        ("gptq:noclip", False, True, False),
    ],
)
def test_what_a_method_needs(name, clips, calibrated, uses_awq):
    recipe = parse_method(name)
    assert (recipe.clips, recipe.calibrated, recipe.uses_awq) == (clips, calibrated, uses_awq)
    assert recipe.mixed == name.startswith("mixed")
    assert recipe.uses_gptq == name.startswith("gptq")


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("rtn:clip", False),
        ("awq", True),
        ("mixed-rtn", False),
        ("mixed-rtn:clip", True),
        ("mixed", True),
        ("gptq:clip", False),
    ],
)
def test_which_methods_need_statistics_of_every_input(name, needed):
    assert parse_method(name).uses_statistics is needed


def test_every_method_has_a_line_and_a_recipe():
    for name, line in METHODS.items():
        assert line
        assert parse_method(name).method == name


def test_flags_say_what_a_name_leaves_out_and_no_more():
    defaults = Defaults(budget=5.0, importance="positional", quantize_head=True)
    assert parse_method("rtn", defaults) == Recipe("rtn", "rtn", quantize_head=True)
    mixed = parse_method("mixed", defaults)
    assert (mixed.budget, mixed.importance) == (5.0, "positional")
    named = parse_method("mixed:6bpw-measured", defaults)
    assert (named.budget, named.importance) == (6.0, "measured")


def test_a_name_alone_does_not_change_the_numbers():
    recipe = parse_method("rtn:g32")
    assert dataclasses.replace(recipe, name="another").identity() == recipe.identity()
    assert parse_method("awq").identity() == parse_method("awq:clip").identity()
    assert parse_method("gptq").identity() == parse_method("gptq:damp0.01-actorder-clip").identity()
    assert parse_method("gptq").identity() != parse_method("gptq:noactorder").identity()
    assert "name" not in recipe.identity()
    for other in ("rtn:g64", "rtn:g32-clip", "rtn:g32-head", "awq:g32", "mixed-rtn:g32"):
        assert parse_method(other).identity() != recipe.identity()


def test_lists_of_names():
    assert [recipe.name for recipe in parse_methods("rtn, awq:g32,,mixed")] == ["rtn", "awq:g32", "mixed"]
    for nothing in ("", " , "):
        with pytest.raises(UsageError, match="--methods names no method"):
            parse_methods(nothing)
    with pytest.raises(UsageError, match="Two variants are named 'rtn'; names must be distinct"):
        check_distinct(parse_methods("rtn,awq,rtn"))
    check_distinct(parse_methods("rtn,awq"))


@pytest.mark.parametrize(("text", "bits"), [("4.8bpw", 4.8), ("4.8", 4.8), (" 6bpw ", 6.0), ("5", 5.0)])
def test_budgets(text, bits):
    assert parse_budget(text) == bits


@pytest.mark.parametrize("text", ["", "lots", "4.8 bpw", "-4bpw", "4.bpw", "4,8bpw", "nan", "1e3"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match=r"takes bits per weight such as 4\.8bpw, not '"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rtm", "Unknown method 'rtm'; nearest: rtn, ort. Choices: autoround, awq, gptq"),
        ("", "Unknown method ''"),
        ("rtn:4bpw", "'rtn:4bpw': a budget or a high grid belongs to mixed methods, not to rtn."),
        ("gptq:4bpw", "'gptq:4bpw': a budget or a high grid belongs to mixed methods, not to gptq."),
        ("rtn:damp0.1", "'rtn:damp0.1': damping and act-order belong to gptq, not to rtn."),
        ("awq:noactorder", "'awq:noactorder': damping and act-order belong to gptq, not to awq."),
        ("gptq:damp0", "'gptq:damp0': damping is a share above 0 and at most 1, not 0."),
        ("gptq:damp3", "'gptq:damp3': damping is a share above 0 and at most 1, not 3."),
    ],
)
def test_what_is_no_method_is_refused(name, said):
    with pytest.raises(UsageError) as caught:
        parse_method(name)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["", "baseline"])
def test_no_variant_takes_the_baselines_name(name):
    with pytest.raises(UsageError, match="that name is the unquantized model's"):
        Recipe(name, "rtn")


def test_the_first_rule_that_matches_counts():
    recipe = Recipe("ruled", "rtn", rules=(Rule("*.0.*down_proj*", "float"), Rule("*down_proj*", "int8")))
    assert recipe.rule_for("model.layers.0.mlp.down_proj.weight") == "float"
    assert recipe.rule_for("model.layers.10.mlp.down_proj.weight") == "int8"
    assert recipe.rule_for("model.layers.0.mlp.up_proj.weight") is None
    assert recipe.rule_for("model.layers.0.mlp.Down_proj.weight") is None


def config(tmp_path, text):
    path = tmp_path / "recipes.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_gives_recipes(tmp_path):
    path = config(
        tmp_path,
        """
        variants:
          - rtn:g32
          - {name: Ours, method: mixed, grid: int4-g64, high: int8-channel, budget: 5.5, quantize_head: true}
          - {name: Bits, method: "mixed:6bpw"}
          - {method: "awq:g32", clip: false}
          - name: Ruled
            method: rtn
            rules:
              - {match: "*v_proj*", grid: int8}
              - {match: "*down_proj*", grid: float}
        """,
    )
    assert load_recipes(path, Defaults(budget=5.0)) == [
        Recipe("rtn:g32", "rtn", "g32"),
        Recipe("Ours", "mixed", "int4-g64", high="int8-channel", budget=5.5, quantize_head=True),
        Recipe("Bits", "mixed", budget=6.0),
        Recipe("awq:g32", "awq", "g32", clip=False),
        Recipe("Ruled", "rtn", rules=(Rule("*v_proj*", "int8"), Rule("*down_proj*", "float"))),
    ]


@pytest.mark.parametrize("budget", ["5.5", "5.5bpw", "'5.5'", "'5.5bpw'"])
def test_a_budget_in_a_file_may_be_a_number_or_a_text(tmp_path, budget):
    (recipe,) = load_recipes(config(tmp_path, f"variants: [{{name: a, method: mixed, budget: {budget}}}]"))
    assert recipe.budget == 5.5


BROKEN = {
    "rtn": "must hold a mapping with a list 'variants'",
    "": "must hold a mapping with a list 'variants'",
    "variants: [": "is not valid YAML: ",
    "variants: []": "'variants' must be a list with at least one recipe",
    "variants: rtn": "'variants' must be a list with at least one recipe",
    "variant: [rtn]": "recipes.yaml 'variant'; nearest: variants. Choices: variants.",
    "variants: [3]": "variant 1 must be a mapping or a method's name",
    "variants: [rtn, {name: a}]": "variant 2 names no method",
    "variants: [{name: a, method: rtn, gird: g32}]": "'gird'; nearest: grid.",
    "variants: [{name: a, method: rtn, clip: 1}]": "'clip' must be bool, not 1",
    "variants: [{name: 1, method: rtn}]": "'name' must be str, not 1",
    "variants: [{name: baseline, method: rtn}]": "cannot be named 'baseline'",
    "variants: [{name: a, method: rtn, high: int8}]": "belongs to mixed methods, not to rtn",
    "variants: [{name: a, method: mixed, budget: lots}]": "variant 1: 'budget' takes bits per weight such as 4.8bpw",
    "variants: [{name: a, method: mixed, budget: true}]": "variant 1: 'budget' must be str or int or float, not True",
    "variants: [{name: a, method: mixed, importance: measurd}]": "'measurd'; nearest: measured.",
    "variants: [{name: a, method: gptq, damping: no}]": "'damping' must be int or float, not False",
    "variants: [{name: a, method: gptq, damping: .nan}]": "damping is a share above 0 and at most 1, not nan",
    "variants: [{name: a, method: rtn, act_order: false}]": "damping and act-order belong to gptq, not to rtn",
    "variants: [{name: a, method: rtn, rules: [x]}]": "a rule must be a mapping with 'match' and 'grid'",
    "variants: [{name: a, method: rtn, rules: [{match: x}]}]": "a rule needs both 'match' and 'grid'",
    "variants: [{name: a, method: rtn, rules: [{match: x, grids: y}]}]": "'grids'; nearest: grid.",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_told_in_one_sentence(tmp_path, text):
    with pytest.raises(UsageError) as caught:
        load_recipes(config(tmp_path, text))
    sentence = str(caught.value)
    assert BROKEN[text] in sentence
    assert "\n" not in sentence


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"Cannot read the config .*none.yaml: No such file"):
        load_recipes(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"Cannot read the config .*: Is a directory"):
        load_recipes(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("variants: [é]".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.yaml is not valid YAML"):
        load_recipes(tmp_path / "latin.yaml")


SHIPPED = sorted(path for path in shipped("configs").glob("*.yaml") if "variants:" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: Path(path).stem)
def test_the_shipped_files_are_sound(path):
    recipes = load_recipes(path)
    check_distinct(recipes)
    for recipe in recipes:
        grids = [recipe.grid, *filter(None, [recipe.high]), *(r.grid for r in recipe.rules if r.grid != "float")]
        assert all(parse(grid) for grid in grids)


def test_the_reference_columns_are_shipped():
    assert {"seven-columns", "granularity"} <= {path.stem for path in SHIPPED}
    names = [recipe.name for recipe in load_recipes(shipped("configs/seven-columns.yaml"))]
    assert names == ["Mixed AWQ", "Mixed RTN", "INT4 AWQ", "INT4 RTN", "INT8 RTN", "INT8 AWQ"]
