"""Mixes of any number of formats: what they keep to, whatever the method, and what they refuse."""

import json
from itertools import pairwise

import pytest
import torch

from qeval.config import GridRule, Recipe, parse_method
from qeval.errors import UsageError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quantize.build import build_variant, possible_grids, source_of
from qeval.quantize.mix import trial_units
from qeval.quantize.sensitivity import measure
from qeval.quantize.statistics import collect
from qeval.store.variants import MANIFEST, Origin, load_variant, save_variant
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import tiny_llama

SAMPLES = [list(range(start, start + 48)) for start in (1, 49, 97, 145, 193, 17)]
THREE = "int4-g32/nvfp4/int8-channel"
FOUR = "mxfp4/nvfp4/fp8-channel/bf16"
METHODS = [f"mixed-rtn:{THREE}-6bpw", f"mixed:{THREE}-6bpw", f"mixed-rtn:{FOUR}-14bpw", f"mixed:{FOUR}-14bpw"]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(hidden_size=128, intermediate_size=256)


def source_for(model, recipe, samples=SAMPLES):
    description = describe_model(model)
    statistics = collect(model, description, samples, 0, lambda done: None) if recipe.needs_statistics else {}
    return source_of(model, description, head_of(model), samples, statistics)


def made(model, recipe):
    recipe = parse_method(recipe) if isinstance(recipe, str) else recipe
    return build_variant(source_for(model, recipe), recipe, "key", lambda done: None)


def grids_of(variant):
    return {name: str(weight.grid) for name, weight in variant.weights.items()}


@pytest.fixture(scope="module")
def variants(model):
    return {name: made(model, name) for name in METHODS}


every_mix = pytest.mark.parametrize("name", METHODS)


@every_mix
def test_the_budget_holds_by_a_count_of_its_own(model, variants, name):
    variant, budget = variants[name], parse_method(name).budget
    bits = sum(weight.grid.size_bits(*weight.codes.shape) for weight in variant.weights.values())
    bits += 32 * sum(len(scales) for scales in variant.input_scales.values())
    in_float = [kept for kept in variant.kept if kept.reason == "the mix leaves it in float"]
    bits += 32 * sum(kept.parameters for kept in in_float)  # the tiny model is in fp32
    weights = sum(w.codes.numel() for w in variant.weights.values()) + sum(kept.parameters for kept in in_float)
    assert variant.bits_per_weight == pytest.approx(bits / weights)
    assert budget * 0.9 < variant.bits_per_weight <= budget
    assert bool(in_float) == any(choice.format == "float" for choice in variant.choices)


@every_mix
def test_what_runtimes_fuse_has_one_format(model, variants, name):
    grids = grids_of(variants[name])
    for layer in range(2):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({grids.get(f"model.layers.{layer}.{linear}.weight") for linear in fused}) == 1
    assert len({choice.format for choice in variants[name].choices}) > 1
    for choice in variants[name].choices:
        assert {grids.get(each, "float") for each in choice.names} == {choice.format}
    account = {*grids, *(kept.name for kept in variants[name].kept)}
    assert account == set(source_for(model, parse_method("rtn:g32")).search.parameters)


@every_mix
def test_a_group_is_given_no_format_that_another_betters_at_fewer_bits(model, variants, name):
    parameters = dict(model.named_parameters())
    for choice in variants[name].choices:
        bits = {
            each: sum(parse(each).size_bits(*parameters[weight].shape) for weight in choice.names)
            for each in choice.kls
        }
        worse = {
            each
            for each, kl in choice.kls.items()
            if any(bits[other] <= bits[each] and choice.kls[other] < kl for other in choice.kls)
        }
        assert choice.format not in worse


def test_a_format_that_another_one_dominates_everywhere_is_never_chosen(model):
    """The 2-bit integers in blocks of 4 take more bits than INT8 by row, and lose more."""
    variant = made(model, "mixed-rtn:int4-g32/int2-g4-asym/int8-channel-7bpw")
    assert {choice.format for choice in variant.choices} == {"int4-g32-signed", "int8-channel"}
    assert all("int2-g4-asym" in choice.kls for choice in variant.choices)


def test_a_kl_is_that_of_the_group_alone_in_the_format(model, variants):
    """Against `measure` with the grid's own rounding put in by hand."""
    variant, source = variants[METHODS[0]], source_for(model, parse_method("rtn:g32"))
    for name in ("nvfp4", "int8-channel"):
        kls = measure(
            model,
            source.description,
            source.head,
            SAMPLES,
            lambda group, name=name: {
                each: quantize_rtn(source.search.parameters[each].float(), parse(name)).dequantize()
                for each in group.names
            },
            lambda done: None,
        )
        assert {choice.names[0]: choice.kls[name] for choice in variant.choices} == pytest.approx(kls, rel=1e-6)


def test_more_bits_are_never_predicted_to_lose_more(model):
    kls = []
    for budget in (5, 5.5, 6, 7, 9, 12):
        variant = made(model, f"mixed-rtn:int4-g32/nvfp4/fp8-channel/bf16-{budget}bpw")
        kls.append(sum(choice.kls.get(choice.format, 0.0) for choice in variant.choices))
    assert all(later <= earlier for earlier, later in pairwise(kls))
    assert kls[-1] < kls[0]


def test_the_order_of_formats_and_other_spellings_change_nothing(model):
    one, other = (parse_method(f"mixed-rtn:{text}") for text in ("int4-g32/bf16/fp8-6bpw", "6bpw-fp8-channel/g32/fp16"))
    assert one.identity() == other.identity()
    assert grids_of(made(model, one)) == grids_of(made(model, other))


def test_two_candidates_choose_as_well_as_two_widths(model):
    """Both hold the same budget; the widths' KL of INT8 is an estimate, the formats' is measured."""
    widths, formats = made(model, "mixed-rtn:g32-7bpw"), made(model, "mixed-rtn:int4-g32/int8-g32-7bpw")
    low = {choice.names: choice.kl_low for choice in widths.choices}
    assert {choice.names: choice.kls["int4-g32-signed"] for choice in formats.choices} == low
    assert {choice.names: choice.bits for choice in formats.choices} == {
        choice.names: choice.bits for choice in widths.choices
    }


def test_predicted_mixes_are_measured_with_each_format_alone(model):
    recipe = parse_method(f"mixed:{THREE}-6bpw-fisher")
    source, units = source_for(model, recipe), []
    variant = build_variant(source, recipe, "key", units.append)
    measured = dict(part.rsplit(" ", 1) for part in variant.details["measured KL (nats)"].split(", "))
    assert set(measured) == {"proposal", "flatter", "steeper", "all nvfp4", "all int4-g32-signed"}
    assert float(measured[variant.details["accepted"]]) == min(map(float, measured.values()))
    assert variant.bits_per_weight <= 6
    assert all(choice.kls == {} and choice.format for choice in variant.choices)
    assert trial_units(source.description, recipe) == 4 * trial_units(source.description, parse_method("mixed"))


def test_experts_of_a_layer_have_one_format():
    model = tiny_family("Mixtral")
    variant = made(model, "mixed-rtn:int4-g32/mxfp4/int8-channel/fp16-7bpw")
    assert variant.bits_per_weight <= 7
    for choice in variant.choices:
        assert {grids_of(variant).get(name, "float") for name in choice.names} == {choice.format}
    assert sum("experts" in choice.names[0] for choice in variant.choices) >= 2


def test_rules_and_the_head_are_not_chosen_for(model):
    rules = (GridRule("*.1.self_attn.o_proj*", "int8-g32"), GridRule("*.0.mlp.down*", "float"))
    recipe = Recipe("a", "mixed", formats=("bf16", "nvfp4", "int4-g32"), budget=8.0, rules=rules, quantize_head=True)
    variant = made(model, recipe)
    grids = grids_of(variant)
    assert grids["model.layers.1.self_attn.o_proj.weight"] == "int8-g32"
    assert grids[source_for(model, recipe).description.head] == "nvfp4"
    assert variant.bits_per_weight <= 8
    chosen = {name for choice in variant.choices for name in choice.names}
    assert chosen.isdisjoint({"model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"})
    with pytest.raises(UsageError, match="'b' has nothing to mix: its rules give every weight a format"):
        made(model, Recipe("b", "mixed-rtn", formats=("nvfp4", "bf16"), rules=(GridRule("*", "int8-g32"),)))


@every_mix
def test_it_reads_back_from_disk_with_the_format_of_each_group(variants, name, tmp_path):
    variant = variants[name]
    origin = Origin(recipe={"method": "mixed"}, model={"name": "m"}, calibration=None, float_bits=32, seconds=1.0)
    save_variant(variant, tmp_path / "v", origin)
    again = load_variant(tmp_path / "v")
    assert again.choices == variant.choices
    assert again.bits_per_weight == variant.bits_per_weight
    assert all(torch.equal(again.weights[key].codes, weight.codes) for key, weight in variant.weights.items())
    manifest = json.loads((tmp_path / "v" / MANIFEST).read_text())
    assert manifest["bits_per_weight"] == variant.bits_per_weight
    assert [choice["format"] for choice in manifest["choices"]] == [choice.format for choice in variant.choices]


def test_a_mix_of_two_widths_says_no_more_on_disk_than_before(model, tmp_path):
    origin = Origin(recipe={"method": "mixed"}, model={"name": "m"}, calibration=None, float_bits=32, seconds=1.0)
    save_variant(made(model, "mixed-rtn:g32-7bpw"), tmp_path / "v", origin)
    (fields,) = {tuple(choice) for choice in json.loads((tmp_path / "v" / MANIFEST).read_text())["choices"]}
    assert fields == ("layer", "kind", "names", "parameters", "kl_low", "kl_high", "bits")


REFUSED = {
    "mixed-rtn:int4-g32/bf16": r"names formats and no size; add one such as 18\.5bpw, .* takes 5\.000 to 32\.000",
    "mixed-rtn:int4-g32/bf16-4bpw": r"4 bits per weight is below the smallest .* takes 5\.000 to 32\.000",
    "mixed-rtn:int4-g32/nvfp4-6bpw": r"6 bits per weight is above the largest .* takes 4\.50\d to 5\.000",
    "mixed-rtn:int4-g32/bf16-32bpw": "32 bits per weight leaves every group in float",
    "mixed-rtn:int4-g32/int8-g256-6bpw": "Blocks of 256 are larger than a row of model.layers.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_chosen_is_refused_before_any_work(model, name):
    recipe = parse_method(name)
    with pytest.raises(UsageError, match=REFUSED[name]):
        possible_grids(source_of(model, describe_model(model), head_of(model), (), {}), recipe)
