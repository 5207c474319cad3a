"""Predicted sensitivities against what they predict, and the choice that a measurement of whole mixes makes."""

import pytest
import torch

from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quantize import fisher, select_mix
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.fisher import predict
from qeval.quantize.sensitivity import measure, trial_passes
from qeval.quantize.statistics import collect
from tests.fixtures.families import tiny_family

GRID = parse("int3-g32")


@pytest.fixture(params=["Llama", "Mistral", "Gemma2", "Phi", "Granite", "Cohere"])
def model(request):
    return tiny_family(request.param)


def texts(count=2, length=100):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, length), generator=generator).tolist()


def nudged(model, share=0.05):
    """A twentieth of the rounding error, so small that KL is quadratic in it."""
    parameters = dict(model.named_parameters())

    def of(group):
        errors = {name: quantize_rtn(parameters[name], GRID).dequantize() - parameters[name] for name in group.names}
        return {name: parameters[name] + share * error for name, error in errors.items()}

    return of


def predicted(model, effective, seeds, samples=None):
    found = [
        predict(model, describe_model(model), head_of(model), samples or texts(), effective, lambda done: None, seed)
        for seed in range(seeds)
    ]
    return {name: sum(each[name] for each in found) / seeds for name in found[0]}


def test_where_no_token_sees_anothers_error_the_prediction_is_the_kl(model, monkeypatch):
    """Right by theory for the last layer's mlp: nothing after it looks at other tokens."""
    monkeypatch.setattr("qeval.quantize.sensitivity.EVERY", 1)
    samples, effective = texts(), nudged(model)
    expected = measure(model, describe_model(model), head_of(model), samples, effective, lambda done: None)
    found = predicted(model, effective, 25, samples)
    last = [
        g.names[0]
        for g in describe_model(model).groups
        if g.layer == 1 and "mlp" in g.names[0] and "_proj" in g.names[0]
    ]
    assert last or "Phi" in type(model).__name__
    for name in last:
        assert found[name] == pytest.approx(expected[name], rel=0.12), name


def test_elsewhere_it_is_near_enough_to_rank_by(model):
    samples, effective = texts(), nudged(model)
    expected = measure(model, describe_model(model), head_of(model), samples, effective, lambda done: None)
    found = predicted(model, effective, 10, samples)
    assert list(found) == list(expected)
    for name, kl in expected.items():
        assert 0.25 < found[name] / kl < 4, name


def test_the_model_stays_as_it_was_and_without_hooks(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    with torch.inference_mode():
        predict(model, describe_model(model), head_of(model), texts(), nudged(model), told.append)
    assert sum(told) == trial_passes(describe_model(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_weights_that_do_not_change_and_groups_left_in_float_have_none():
    model = tiny_family("Llama")
    parameters = dict(model.named_parameters())
    first = describe_model(model).groups[0].names[0]
    found = predicted(model, lambda g: {} if g.names[0] == first else {n: parameters[n].clone() for n in g.names}, 1)
    assert set(found.values()) == {0.0}


def test_a_seed_draws_the_labels():
    model = tiny_family("Llama")
    arguments = model, describe_model(model), head_of(model), texts(), nudged(model), lambda done: None
    assert predict(*arguments, 3) == predict(*arguments, 3)
    assert predict(*arguments, 3) != predict(*arguments, 4)


def slow_kl(model, samples, replaced):
    ids = torch.tensor(samples)
    base = model(ids).logits.double().log_softmax(-1)
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].clone() for name in replaced}
    for name, value in replaced.items():
        parameters[name].data.copy_(value)
    other = model(ids).logits.double().log_softmax(-1)
    for name, value in saved.items():
        parameters[name].data.copy_(value)
    return float((base.exp() * (base - other)).sum(-1).mean())


def test_a_way_is_measured_as_a_whole_on_the_last_samples(model):
    description, samples = describe_model(model), texts(5, 60)
    mixes = {"all": nudged(model, 1.0), "none": lambda group: {}, "half": nudged(model, 0.5)}
    before, told = {name: value.clone() for name, value in model.state_dict().items()}, []
    found = select_mix.measure_mixes(model, description, head_of(model), samples, mixes, told.append)
    assert sum(told) == trial_passes(description)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found["none"] == 0.0
    for name in ("all", "half"):
        replaced = {n: v for group in description.groups for n, v in mixes[name](group).items()}
        assert found[name] == pytest.approx(slow_kl(model, samples[-select_mix.MIX_SAMPLES :], replaced), rel=1e-3)


def made(model, method, samples):
    recipe, description = parse_method(method), describe_model(model)
    statistics = collect(model, description, samples, 0, lambda done: None) if recipe.needs_statistics else {}
    return build_variant(
        source_of(model, description, head_of(model), samples, statistics), recipe, "key", lambda done: None
    )


@pytest.mark.parametrize("method", ["mixed-rtn", "mixed"])
def test_the_best_measured_way_is_taken_and_told(method):
    model, samples = tiny_family("Llama"), texts(8, 60)
    variant = made(model, f"{method}:int3-g32-fisher-5bpw", samples)
    told = variant.details
    measured = {
        words.rsplit(" ", 1)[0]: float(words.rsplit(" ", 1)[1]) for words in told["measured KL (nats)"].split(", ")
    }
    assert set(measured) >= {"proposal", "flatter", "steeper", "all low"}
    spent = {name: kl for name, kl in measured.items() if name != "all low"}
    assert spent[told["accepted"]] == min(spent.values())
    assert min(spent.values()) < measured["all low"]
    assert variant.bits_per_weight <= 5.0
    assert {choice.bits for choice in variant.choices} == {3, 8}
    assert all(choice.kl_low is None for choice in variant.choices)  # predicted is not measured


def test_without_text_to_accept_on_it_is_refused():
    with pytest.raises(UsageError, match="give at least 6 --calibration-samples"):
        made(tiny_family("Llama"), "mixed-rtn:g32-fisher", texts(3, 60))
    assert fisher.FISHER_SAMPLES + select_mix.MIX_SAMPLES == 6
