"""Recipes from names and from YAML: what they mean, what is refused, and that the shipped ones are sound."""

import dataclasses
import json
from pathlib import Path

import pytest

from qeval.config import (
    Defaults,
    GridRule,
    Recipe,
    check_distinct,
    parse_budget,
    parse_method,
    parse_methods,
)
from qeval.errors import UsageError
from qeval.methods import METHODS
from qeval.paths import shipped
from qeval.quant.grid import parse
from qeval.recipe_files import load_recipes

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
    "mixed:int4-g32/nvfp4/bf16-5bpw": Recipe(
        "mixed:int4-g32/nvfp4/bf16-5bpw", "mixed", budget=5.0, formats=("int4-g32", "nvfp4", "bf16")
    ),
    "mixed-rtn:6bpw-fisher-g32/fp8": Recipe(
        "mixed-rtn:6bpw-fisher-g32/fp8", "mixed-rtn", budget=6.0, importance="fisher", formats=("g32", "fp8")
    ),
    "gptq": Recipe("gptq", "gptq"),
    "gptq:int8-channel-noactorder": Recipe("gptq:int8-channel-noactorder", "gptq", "int8-channel", act_order=False),
    "gptq:g32-damp0.05-clip": Recipe("gptq:g32-damp0.05-clip", "gptq", "g32", clip=True, damping=0.05),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_a_recipe(name):
    assert parse_method(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "clips", "calibrated", "scales_inputs"),
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
def test_what_a_method_needs(name, clips, calibrated, scales_inputs):
    recipe = parse_method(name)
    assert (recipe.clips, recipe.calibrated) == (clips, calibrated)
    assert recipe.quant_method.scales_inputs == scales_inputs
    assert recipe.quant_method.mixes == name.startswith("mixed")
    assert (recipe.quant_method.rounding == "sequential") == name.startswith("gptq")


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
    assert parse_method(name).needs_statistics is needed


def test_every_method_has_a_line_and_a_recipe():
    for name, method in METHODS.items():
        assert method.description
        assert parse_method(f"{name}+kv-int8").method == name


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


PLAIN = {
    "method": "rtn",
    "grid": "int4-g128-signed",
    "high": None,
    "clip": False,
    "budget": None,
    "importance": "measured",
    "quantize_head": False,
    "rules": [],
    "damping": None,
    "act_order": None,
}
GPTQ = PLAIN | {"method": "gptq", "clip": True, "damping": 0.01, "act_order": True}
MIXED = PLAIN | {"method": "mixed", "high": "int8-g128", "clip": True}
UNSAID = PLAIN | {"grid": "int4-g128"}  # what qeval does not quantize, or not on one grid, has no range of its own
IDENTITIES = {
    "rtn": PLAIN,
    "rtn:int8-channel": PLAIN | {"grid": "int8-channel"},
    "rtn:int3-clip-g64": PLAIN | {"grid": "int3-g64-signed", "clip": True},
    "rtn:g32-asym-head": PLAIN | {"grid": "g32-asym", "quantize_head": True},
    "awq": PLAIN | {"method": "awq", "clip": True},
    "awq:g32-noclip": PLAIN | {"method": "awq", "grid": "g32-signed"},
    "awq:g32-noclip-fold": PLAIN | {"method": "awq", "grid": "g32-signed", "fold_only": True},
    "gptq": GPTQ,
    "gptq:int8-channel-noactorder": GPTQ | {"grid": "int8-channel", "act_order": False},
    "gptq:g32-damp0.05-noclip": GPTQ | {"grid": "g32-signed", "damping": 0.05, "clip": False},
    "mixed": MIXED,
    "mixed:g32-4.8bpw-fisher": MIXED
    | {"grid": "g32-signed", "high": "int8-g32", "budget": 4.8, "importance": "fisher"},
    "mixed:positional": MIXED | {"importance": "positional"},
    "mixed:g32-signed": MIXED | {"grid": "g32-signed", "high": None},
    "mixed-rtn:6bpw-clip": MIXED | {"method": "mixed-rtn", "budget": 6.0},
    "mixed:bf16/int8-channel/nvfp4-6bpw": MIXED
    | {"grid": "int4-g128", "high": None, "budget": 6.0, "formats": ["nvfp4", "int8-channel", "float"]},
    "modelopt": UNSAID | {"method": "modelopt", "algorithm": "awq_lite"},
    "torchao:int8wo": PLAIN | {"method": "torchao", "grid": "int8-channel", "algorithm": "int8wo"},
    "hqq:int3": PLAIN | {"method": "hqq", "grid": "g64-int3", "algorithm": None},
    "autoround:int4-g64-asym": PLAIN | {"method": "autoround", "grid": "int4-g64-asym", "algorithm": None},
    "mxfp4": PLAIN | {"grid": "mxfp4-floor"},
    "awq:fp8-tensor": PLAIN | {"method": "awq", "grid": "fp8-tensor", "clip": True},
    "rtn:int4-g32-signed": PLAIN | {"grid": "int4-g32-signed"},
    "rtn:int4-g32-full": PLAIN | {"grid": "int4-g32-full"},
    "fp16+kv-int8": UNSAID | {"method": "none", "keys": "int8-token", "values": "int8-token", "clip": False},
    "ort:k_quant-g128": PLAIN | {"method": "ort", "grid": "int4-asym-g128", "algorithm": "k_quant"},
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_is_the_same_to_the_byte_in_every_release(name):
    assert json.dumps(parse_method(name).identity()) == json.dumps(IDENTITIES[name])


def test_the_identity_of_rules_is_the_same_to_the_byte_in_every_release():
    recipe = Recipe("Ruled", "mixed-rtn", "int4-g64", high="int8-channel", rules=(GridRule("*v_proj*", "int8"),))
    rules = {"grid": "int4-g64-signed", "high": "int8-channel", "rules": [{"match": "*v_proj*", "grid": "int8"}]}
    assert json.dumps(recipe.identity()) == json.dumps(PLAIN | {"method": "mixed-rtn"} | rules)


UNFIT_FORMATS = {
    "mixed:int4/": "has an empty name among its formats; name one on both sides of each /, or drop that.",
    "mixed:/": "has an empty name among its formats",
    "mixed:int4/int4-g128-5bpw": "names int4-g128-signed twice among its formats; name each once.",
    "mixed:int4/bf16/fp16": "names float twice among its formats",
    "mixed:int4/nvpf4": "'nvpf4' in 'nvpf4' is not part of a grid's name (nearest: nvfp4)",
    "mixed:int4/mxfp4-ceil": "Unknown grid 'mxfp4-ceil'; nearest: mxfp4-rceil",
    "mixed:int4/bf17": "'bf17' is no format; nearest: bf16.",
    "mixed:int4/nvfp4-positional": "the positional rule knows INT4 and INT8 alone; take --importance measured",
    "rtn:int4/int8": "belong to mixed methods, not to rtn; name one, or take mixed-rtn.",
    "awq:int4/int8": "belong to mixed methods, not to awq; name one, or take mixed.",
    "hqq:int4/int8": "belong to mixed methods, not to hqq; name one, or take mixed.",
}


@pytest.mark.parametrize("name", UNFIT_FORMATS)
def test_formats_that_leave_no_choice_are_refused(name):
    with pytest.raises(UsageError) as caught:
        parse_method(name)
    assert f"'{name}'" in str(caught.value)
    assert UNFIT_FORMATS[name] in str(caught.value)


def test_formats_in_a_file_are_those_of_a_name(tmp_path):
    (recipe,) = load_recipes(
        config(tmp_path, "variants: [{name: a, method: mixed, budget: 5, formats: [int4-g32, nvfp4, bf16]}]")
    )
    assert recipe.identity() == parse_method("mixed:int4-g32/nvfp4/bf16-5bpw").identity()
    assert recipe.candidates == ("nvfp4", "int4-g32-signed", "float")
    assert recipe.trial_grids == ("nvfp4", "int4-g32-signed")
    assert parse_method("mixed:g32").trial_grids == ("g32",)


def test_lists_of_names():
    assert [recipe.name for recipe in parse_methods("rtn, awq:g32,,mixed")] == ["rtn", "awq:g32", "mixed"]
    for nothing in ("", " , "):
        with pytest.raises(UsageError, match="--methods names no method"):
            parse_methods(nothing)
    with pytest.raises(UsageError, match="Two variants are named 'rtn'; names must be distinct"):
        check_distinct(parse_methods("rtn,awq,rtn"))
    check_distinct(parse_methods("rtn,awq"))


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("fp8", "fp8-channel"), ("mxfp4", "mxfp4-floor"), ("mxfp8-rceil", "mxfp8-rceil"), ("nvfp4", "nvfp4"),
        ("mxfp6-e3m2", "mxfp6-e3m2-floor"), ("mxfp6-even", "mxfp6-e2m3-even"), ("fp8e5m2-tensor", "fp8e5m2-tensor"),
    ],
)  # fmt: skip
def test_a_format_alone_is_rounding_to_it(name, resolved):
    recipe = parse_method(name)
    assert (recipe.name, recipe.method, recipe.grid) == (name, "rtn", resolved)
    assert recipe.identity() == parse_method(f"rtn:{resolved}").identity()


def test_a_short_name_in_a_file_has_the_identity_of_the_whole_one(tmp_path):
    (recipe,) = load_recipes(config(tmp_path, "variants: [{name: a, method: gptq, grid: mxfp4}]"))
    assert recipe.identity() == parse_method("gptq:mxfp4-floor").identity()


def test_integers_among_floats_name_their_bits():
    assert str(parse("int8-channel", parse("nvfp4"))) == "int8-channel"
    with pytest.raises(UsageError, match="'g32' does not say which integers, and the rest is on nvfp4; say int4-g32"):
        parse("g32", parse("nvfp4"))


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
        ("nvfp4:int4", "'nvfp4:int4': nvfp4 is a format, not a method; say nvfp4 alone, or rtn:nvfp4."),
        ("quarrot", "Unknown method 'quarrot'; nearest: quarot, quarot-rtn"),
        ("int8-w8a9", "Unknown method 'int8-w8a9'; nearest: int8-w8a8"),
        ("smothquant", "Unknown method 'smothquant'; nearest: smoothquant"),
        ("quarot:int4", "quarot is short for gptq:int4-channel+r1r2 and takes no words after a colon"),
        ("int4-g32", "'int4-g32' names a grid and no method; say for example rtn:int4-g32"),
        ("rtn:int8-w8a9", "'w8a9' in 'int8-w8a9' means nothing; nearest: w8a8."),
        ("awq:int4-nocilp", "'nocilp' in 'int4-nocilp' means nothing; nearest: noclip."),
        ("gptq:dmap0.05", "'dmap0.05' in 'dmap0.05' means nothing; nearest: damp0.01."),
        ("mxpf4", "Unknown method or format 'mxpf4'; nearest: mxfp4"),
        ("mixed-rtn:mxfp4", "'mixed-rtn:mxfp4': mixed-rtn mixes widths of integers, not mxfp4-floor; take rtn, awq or"),
        ("ort:default-g32-half", "'ort:default-g32-half': ort spans its range in a way of its own"),
        ("rtn:4bpw", "'rtn:4bpw': a budget or a high grid belongs to mixed methods, not to rtn."),
        ("gptq:4bpw", "'gptq:4bpw': a budget or a high grid belongs to mixed methods, not to gptq."),
        ("rtn:damp0.1", "'rtn:damp0.1': damping and act-order belong to gptq, not to rtn."),
        ("awq:noactorder", "'awq:noactorder': damping and act-order belong to gptq, not to awq."),
        ("gptq:fold", "'gptq:fold': fold belongs to awq and mixed, which scale inputs, not to gptq."),
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
    recipe = Recipe("ruled", "rtn", rules=(GridRule("*.0.*down_proj*", "float"), GridRule("*down_proj*", "int8")))
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
        Recipe("Ruled", "rtn", rules=(GridRule("*v_proj*", "int8"), GridRule("*down_proj*", "float"))),
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
    "variants: [{name: a, method: mixed, formats: int4}]": "variant 1: 'formats' must be list, not 'int4'",
    "variants: [{name: a, method: mixed, formats: []}]": "variant 1: 'formats' must name at least two formats",
    "variants: [{name: a, method: mixed, formats: [int4, 8]}]": "variant 1: each of 'formats' must be str, not 8",
    "variants: [{name: a, method: mixed, formats: [int4, '']}]": "'a' has an empty name among its formats",
    "variants: [{name: a, method: mixed, formats: [int4]}]": "'a' names one format, int4-g128-signed, and a mix",
    "variants: [{name: a, method: mixed, high: int8, formats: [int4, bf16]}]": "leave the grid (int4-g128)",
    "variants: [{name: a, method: 'mixed:g32', formats: [int4, bf16]}]": "leave the grid (g32) and the high one out",
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
    with pytest.raises(UsageError, match=r"Cannot read .*none.yaml.: No such file"):
        load_recipes(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"Cannot read .*: Is a directory"):
        load_recipes(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("variants: [é]".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.yaml' is not"):
        load_recipes(tmp_path / "latin.yaml")


SHIPPED = sorted(path for path in shipped("configs").glob("*.yaml") if "variants:" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: Path(path).stem)
def test_the_shipped_files_are_sound(path):
    recipes = load_recipes(path)
    check_distinct(recipes)
    for recipe in recipes:
        assert recipe.low_grid.bits <= recipe.high_grid.bits
        assert all(parse(rule.grid) for rule in recipe.rules if rule.grid != "float")


def test_the_reference_columns_are_shipped():
    assert {"seven-columns", "granularity"} <= {path.stem for path in SHIPPED}
    names = [recipe.name for recipe in load_recipes(shipped("configs/seven-columns.yaml"))]
    assert names == ["Mixed AWQ", "Mixed RTN", "INT4 AWQ", "INT4 RTN", "INT8 RTN", "INT8 AWQ"]
