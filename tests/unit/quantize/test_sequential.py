"""GPTQ over a whole model against the slow way: whole passes, all activations kept, X^T X in fp64."""

import pytest
import torch

from qeval.config import parse_method
from qeval.errors import QevalError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.gptq import factorize, quantize_gptq
from qeval.quant.grid import parse
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.sequential import Options, quantize_in_order
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import tiny_llama

GRID = parse("int4-g32")
OPTIONS = Options(damping=0.01, act_order=True, clip=False)


@pytest.fixture(params=["Llama", "Mistral", "Gemma2", "Phi3", "Phi", "Granite"])
def model(request):
    return tiny_family(request.param)


def texts(lengths=(50, 50, 31)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 256, (length,), generator=generator).tolist() for length in lengths]


def in_order(model, samples, grids=None, options=OPTIONS, advance=lambda done: None):
    description = describe_model(model)
    grids = grids or {name: GRID for group in description.groups for name in group.names}
    return quantize_in_order(model, description, samples, grids, options, advance)


def inputs_of(model, name, samples):
    """All inputs of one linear, from whole passes."""
    seen = []
    linear = model.get_submodule(name.removesuffix(".weight"))
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for sample in samples:
        model(torch.tensor([sample]))
    handle.remove()
    return torch.cat(seen)


@torch.inference_mode()
def the_slow_way(model, samples):
    """Codes and losses, each layer's matrices installed for good before the next layer's inputs are looked at."""
    found, description, parameters = {}, describe_model(model), dict(model.named_parameters())
    for layer in range(len(description.layers)):
        groups = [group for group in description.groups if group.layer == layer]
        names = {name: inputs_of(model, name, samples).double() for group in groups for name in group.names}
        for name, inputs in names.items():
            factor = factorize((inputs.T @ inputs / len(inputs)).float(), damping=0.01, act_order=True)
            found[name] = quantize_gptq(parameters[name], GRID, factor)
        for name in names:
            parameters[name].copy_(found[name].weight.dequantize())
    return found


def test_every_matrix_is_what_whole_passes_through_the_rounded_model_give(model):
    samples = texts()
    outcomes = in_order(model, samples)
    expected = the_slow_way(model, samples)
    assert [outcome.name for outcome in outcomes] == list(expected)
    for outcome in outcomes:
        wanted = expected[outcome.name]
        same = (outcome.rounded.weight.codes == wanted.weight.codes).float().mean()
        assert float(same) > 0.98, outcome.name  # fp32 sums in another order turn a tie now and then
        assert outcome.rounded.loss == pytest.approx(wanted.loss, rel=0.02)
        assert outcome.rounded.loss < outcome.rounded.plain_loss


def test_the_model_stays_as_it_was_bit_for_bit(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    in_order(model, texts())
    now = dict(model.named_modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(now) == list(modules)
    assert all(now[name] is module for name, module in modules.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in now.values())


def test_a_failure_half_way_restores_the_model_too():
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers, told = list(model.model.layers), []

    def stop(done):
        told.append(done)
        if len(told) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_order(model, texts(), advance=stop)
    assert list(model.model.layers) == layers
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_group_is_told_and_what_no_grid_names_stays():
    model, told = tiny_llama(), []
    groups = describe_model(model).groups
    kept = groups[0].names[0]
    grids = {name: GRID for group in groups for name in group.names if name != kept}
    outcomes = in_order(model, texts(), grids, advance=told.append)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert told == [sum(sizes[name] for name in group.names if name != kept) for group in groups]
    assert {outcome.name for outcome in outcomes} == set(grids)


def test_inputs_that_are_not_finite_are_an_error_that_names_the_linear():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(QevalError, match=r"layers\.1\.self_attn\.q_proj\.weight: .*not finite"):
        in_order(model, texts())


def made(model, method):
    source = source_of(model, describe_model(model), head_of(model), texts((60,) * 8), {})
    return build_variant(source, parse_method(method), "key", lambda done: None)


def output_loss(model, variant, samples):
    """The squared difference of the final states, with the variant's matrices in place."""
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].clone() for name in variant.weights}
    ids = torch.tensor(samples)
    before = model.base_model(ids).last_hidden_state
    for name, weight in variant.weights.items():
        parameters[name].data.copy_(weight.dequantize())
    after = model.base_model(ids).last_hidden_state
    for name, value in saved.items():
        parameters[name].data.copy_(value)
    return float((after - before).square().mean())


@pytest.mark.parametrize("grid", ["int4-g32", "int4-channel", "int3-g32-asym", "int8-tensor"])
def test_a_variant_is_nearer_to_the_model_than_plain_rounding(grid):
    model, samples = tiny_llama(), texts((60,) * 8)
    ours, plain = made(model, f"gptq:{grid}"), made(model, f"rtn:{grid}")
    assert set(ours.weights) == set(plain.weights)
    assert ours.kept == plain.kept
    assert ours.size_bytes(16) == plain.size_bytes(16)
    unclipped = made(model, f"gptq:{grid}-noclip")
    assert all(torch.equal(unclipped.weights[name].scales, plain.weights[name].scales) for name in plain.weights)
    assert output_loss(model, unclipped, samples) < output_loss(model, plain, samples)
    assert output_loss(model, ours, samples) < output_loss(model, plain, samples)


def test_what_the_method_decided_is_in_the_details():
    variant = made(tiny_llama(), "gptq:g32-head-noactorder-damp0.05")
    assert variant.details["columns"].startswith("as they stand")
    assert variant.details["damping"] == "0.05 of the mean second moment"
    assert float(variant.details["loss on the calibration text"].split()[0]) < 1
    assert variant.details["head"] == "rounded to nearest"
    assert "lm_head.weight" in variant.weights
    assert variant.details["damping raised"] == "nowhere"


def test_the_same_text_twice_gives_the_same_integers():
    one, two = made(tiny_llama(), "gptq:g32"), made(tiny_llama(), "gptq:g32")
    assert all(torch.equal(one.weights[name].codes, two.weights[name].codes) for name in one.weights)
