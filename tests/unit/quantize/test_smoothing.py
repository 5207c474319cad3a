"""SmoothQuant against its equation, number by number, and folded exactly."""

import pytest
import torch

from qeval.backends.torch import TorchBackend
from qeval.compare.schemes import with_scheme
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.models.families import tiny_family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.smooth import smooth_scales
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.scaling import folded_floats, row_divisors
from qeval.quantize.smoothing import largest_inputs, smoothed_groups
from qeval.types import Request
from tests.fixtures.tiny import tiny_llama

SAMPLES = [tuple(torch.randint(1, 256, (40,), generator=torch.Generator().manual_seed(n)).tolist()) for n in range(3)]


def loud(model):
    """The model with outliers in the channels that enter the linears: gains of 30 in its norms."""
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] = 30.0
        layer.post_attention_layernorm.weight[7] = 30.0
    return model


def source_for(model):
    description = describe_model(model)
    return source_of(model, description, head_of(model), SAMPLES, {})


def test_scales_are_the_equations():
    weights = [torch.randn(5, 6), torch.randn(3, 6)]
    largest = torch.tensor([1.0, 20.0, 0.0, 3.0, 0.5, 7.0])
    found = smooth_scales(weights, largest, 0.75)
    for column in range(6):
        most = max(abs(float(row[column])) for weight in weights for row in weight)
        expected = float(largest[column]) ** 0.75 / most**0.25 if largest[column] else 1.0
        assert float(found[column]) == pytest.approx(expected, rel=1e-5)


def test_channels_that_one_row_feeds_have_one_scale():
    found = smooth_scales([torch.randn(5, 12)], torch.rand(12) + 0.1, 0.5, repeat=2, head=3)
    runs = found.reshape(2, 2, 3)
    assert torch.equal(runs[:, 0], runs[:, 1])


def test_largest_inputs_are_those_of_the_text():
    model = tiny_llama()
    groups, seen = describe_model(model).groups, []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = largest_inputs(model, groups, SAMPLES)
    hook.remove()
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], torch.cat(seen).abs().amax(dim=(0, 1)))


@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT2", "GPTNeoX", "Phi3"])
def test_folding_the_scales_leaves_the_model_as_it_was(family):
    model = tiny_family(family)
    source = source_for(model)
    groups, parameters = source.description.groups, source.search.parameters
    grids = {name: parse_method("rtn").low_grid for group in groups for name in group.names}
    scales = smoothed_groups(groups, parameters, grids, largest_inputs(model, groups, SAMPLES), 0.5)
    assert scales
    ids = torch.tensor([SAMPLES[0]])
    before = model(input_ids=ids).logits
    divisors, floats = row_divisors(scales, parameters), folded_floats(scales, parameters, grids)
    changed = {}
    for group in groups:
        scaled = scales.get(group.names[0])
        for name in group.names:
            matrix = parameters[name] / divisors[name].unsqueeze(1) if name in divisors else parameters[name]
            changed[name] = matrix * scaled.choice.scales if scaled else matrix.clone()
    for name, value in (changed | floats).items():
        parameters[name].copy_(value)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=2e-4)


def kl(model, name):
    """Mean KL of a recipe's variant from the model, in nats."""
    recipe, source = parse_method(name), source_for(model)
    backend = TorchBackend(model, source.description, source.head, torch.float32)
    weights = build_variant(source, recipe.weights_alone, "key", lambda done: None)
    variant = with_scheme(weights, recipe, model, source.description, SAMPLES, lambda done: None)
    request = [Request(SAMPLES[0], tuple(range(40)))]
    logits = []
    for target in (None, variant):
        with backend.open(target) as session:
            logits.append(session.logits(session.states(request)[0]).double().log_softmax(-1))
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


def test_outliers_cost_less_once_they_are_smoothed():
    model = loud(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert kl(model, "smoothquant") < 0.5 * kl(model, "int8-w8a8")
    assert kl(model, "smoothquant:int8-channel+a-int8-static") < 0.5 * kl(model, "rtn:int8-channel+a-int8-static")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_its_name_alone_is_w8a8_and_alpha_a_half():
    recipe = parse_method("smoothquant")
    assert (recipe.grid, recipe.activations, recipe.smoothing) == ("int8-channel", "int8-token", 0.5)
    other = parse_method("smoothquant:alpha0.8")
    assert (other.grid, other.activations, other.smoothing) == ("int8-channel", "int8-token", 0.8)
    assert recipe.identity() == parse_method("smoothquant:int8-w8a8-alpha0.5").identity()
    assert "alpha" not in parse_method("rtn").identity()
    for name in ("rtn:alpha0.5", "smoothquant:alpha1.5", "smoothquant:clip"):
        with pytest.raises(UsageError):
            parse_method(name)
