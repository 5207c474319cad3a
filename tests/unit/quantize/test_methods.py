"""What every method owes, over the whole table of methods; other tools by a stand-in that rounds to nearest."""

from typing import get_args

import pytest
import torch

from qeval.config import parse_method
from qeval.methods import METHODS, Rounding
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.rtn import quantize_rtn
from qeval.quantize.build import build_variant, plan_variant, possible_grids, source_of
from qeval.quantize.mix import trial_units
from qeval.quantize.quantizers import QUANTIZERS, quantize_plan, rounding_units
from qeval.quantize.scaling import quantize_groups
from qeval.quantize.statistics import collect
from qeval.quantize.tools import registry
from qeval.quantize.tools.base import Tool
from tests.fixtures.tiny import tiny_llama

SAMPLES = [list(range(start, start + 48)) for start in (1, 49, 97, 145, 193, 17)]


def round_all(job):
    return {name: quantize_rtn(job.parameters[name].float(), grid) for name, grid in job.grids.items()}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for name in registry.TOOLS:
        monkeypatch.setitem(registry.TOOLS, name, Tool(round_all, name, name, f"pip install {name}"))
    monkeypatch.setattr(registry, "find_spec", lambda package: package)
    monkeypatch.setattr(registry, "version", lambda distribution: "1.0")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(hidden_size=128, intermediate_size=256)


def source_for(model, recipe):
    """No more than what the recipe says that it needs."""
    description, samples = describe_model(model), SAMPLES if recipe.calibrated else ()
    statistics = collect(model, description, samples, 0, lambda done: None) if recipe.needs_statistics else {}
    return source_of(model, description, head_of(model), samples, statistics)


every_method = pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])


@every_method
def test_every_linear_is_quantized_and_the_model_left_alone(model, name):
    recipe = parse_method(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    source = source_for(model, recipe)
    variant = build_variant(source, recipe, "key", lambda done: None)
    linears = {name for group in source.description.groups for name in group.names}
    assert set(variant.weights) == linears
    kept = {weight.name for weight in variant.kept}
    assert kept.isdisjoint(linears)
    assert kept | linears | {source.description.head} == set(source.search.parameters)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@every_method
def test_the_same_recipe_gives_the_same_integers(model, name):
    recipe = parse_method(name)
    one, other = (build_variant(source_for(model, recipe), recipe, "key", lambda done: None) for _ in range(2))
    assert all(torch.equal(one.weights[key].codes, other.weights[key].codes) for key in one.weights)
    assert all(torch.equal(one.weights[key].scales, other.weights[key].scales) for key in one.weights)
    assert one.details == other.details


def test_clips_do_not_depend_on_what_rows_were_divided_by_before():
    """In fp16, as checkpoints are: many weights lie halfway between two codes, until their rows are divided."""
    model, recipe = tiny_llama(hidden_size=128, intermediate_size=256).half().float(), parse_method("awq:g32")
    before, fresh = (source_for(model, recipe).search for _ in range(2))
    group = next(group for group in describe_model(model).groups if "up_proj" in group.names[-1])
    grids = dict.fromkeys(group.names, recipe.low_grid)
    divisors = {group.names[-1]: torch.linspace(0.3, 3, 256)}
    quantize_groups(before, [group], grids, {}, divisors, clip=True)
    one, other = (quantize_groups(search, [group], grids, {}, {}, clip=True) for search in (before, fresh))
    assert all(torch.equal(one[name].codes, other[name].codes) for name in group.names)


@every_method
def test_grids_are_among_those_that_were_said_to_be_possible(model, name):
    recipe = parse_method(name)
    source = source_for(model, recipe)
    possible = possible_grids(source, recipe)
    variant = build_variant(source, recipe, "key", lambda done: None)
    assert set(variant.weights) == set(possible)
    assert all(weight.grid in possible[key] for key, weight in variant.weights.items())
    assert len({weight.grid for weight in variant.weights.values()}) == (2 if METHODS[name].mixes else 1)


@every_method
def test_progress_is_told_the_units_that_were_announced(model, name):
    recipe = parse_method(name)
    source = source_for(model, recipe)
    trials, rounds = [], []
    grids, plan = plan_variant(source, recipe, "key", trials.append)
    assert all(weight.codes.is_meta for weight in plan.weights.values())
    quantize_plan(source, recipe, grids, plan, rounds.append)
    assert sum(trials) == trial_units(source.description, recipe)
    external = METHODS[name].rounding == "external"
    assert sum(rounds) == (0 if external else rounding_units(recipe, plan))


@every_method
def test_a_method_needs_text_before_it_needs_statistics(name):
    recipe = parse_method(name)
    assert recipe.calibrated or not recipe.needs_statistics


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("fp8", "fp8-channel"), ("nvfp4", "nvfp4"), ("rtn:fp8-tile128", "fp8-tile128"),
        ("awq:mxfp4-rceil", "mxfp4-rceil"), ("awq:fp8-tensor", "fp8-tensor"), ("gptq:nvfp4-46", "nvfp4-46"),
        ("gptq:mxfp6", "mxfp6-e2m3-floor"), ("awq:int4-g32-signed", "int4-g32-signed"),
        ("gptq:g32-half", "int4-g32-half"), ("nf4", "nf4"),
    ],
)  # fmt: skip
def test_floats_and_spans_go_through_every_method(model, name, grid):
    recipe = parse_method(name)
    source = source_for(model, recipe)
    variant = build_variant(source, recipe, "key", lambda done: None)
    assert {str(weight.grid) for weight in variant.weights.values()} == {grid}
    assert {str(each) for grids in possible_grids(source, recipe).values() for each in grids} == {grid}
    for key, weight in variant.weights.items():
        error = weight.dequantize() - source.search.parameters[key]
        if recipe.method == "rtn":
            assert float(error.norm() / source.search.parameters[key].norm()) < 0.15
    plan = plan_variant(source, recipe, "key", lambda done: None)[1]
    assert plan.quantized_bits <= variant.quantized_bits  # but for AWQ's input scales


def test_every_way_of_rounding_has_a_quantizer():
    assert set(QUANTIZERS) == set(get_args(Rounding)) == {method.rounding for method in METHODS.values()}


def test_every_other_tool_has_an_adapter_and_no_own_method_has():
    assert {name for name, method in METHODS.items() if method.rounding == "external"} == set(registry.TOOLS)
    assert all(bool(method.algorithms) == (method.rounding == "external") for method in METHODS.values())
