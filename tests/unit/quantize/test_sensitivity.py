"""The shortcut that measures sensitivities against the slow way: the whole model run with one group replaced."""

import pytest
import torch

from qeval.config import parse_method
from qeval.errors import QevalError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quantize import sensitivity
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.context import InMemory
from qeval.quantize.sensitivity import EVERY, SENSITIVITY_SAMPLES, finite_kls, measure
from tests.fixtures.families import tiny_family

GRID = parse("int3-g32")


@pytest.fixture(params=["Llama", "Mistral", "Gemma2", "Phi", "Granite"])
def model(request):
    return tiny_family(request.param)


def texts(count=SENSITIVITY_SAMPLES, length=50):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, length), generator=generator).tolist()


def rounded(model):
    parameters = dict(model.named_parameters())
    return lambda group: {name: quantize_rtn(parameters[name], GRID).dequantize() for name in group.names}


def the_slow_way(model, ids, replaced):
    """The mean KL over every fourth position, by its definition in fp64, from the model's own logits."""
    base = model(ids).logits[:, ::EVERY].double().log_softmax(-1)
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].clone() for name in replaced}
    for name, value in replaced.items():
        parameters[name].copy_(value)
    other = model(ids).logits[:, ::EVERY].double().log_softmax(-1)
    for name, value in saved.items():
        parameters[name].copy_(value)
    return float((base.exp() * (base - other)).sum(-1).mean())


def measured(model, samples, effective, advance=lambda done: None):
    return measure(model, describe_model(model), head_of(model), samples, effective, advance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_is_named_and_chooses_nothing(value):
    assert finite_kls("mixed", {"a": 0.5}) == {"a": 0.5}
    with pytest.raises(QevalError, match=r"'mixed': KL with b quantized is not finite .* \(one of 1 among 2\)"):
        finite_kls("mixed", {"a": 0.5, "b": value})


@pytest.mark.parametrize(("method", "trial"), [("g32", "measure"), ("g32-fisher", "predict")])
def test_a_mix_of_undefined_sensitivities_is_a_failure_that_names_them(monkeypatch, method, trial):
    model, samples = tiny_family("Llama"), texts(6)
    source = source_of(model, describe_model(model), head_of(model), samples, {})
    monkeypatch.setattr(InMemory, trial, lambda *_: {"model.layers.0.mlp": float("nan")})
    with pytest.raises(QevalError, match=r"KL with model.layers.0.mlp quantized is not finite"):
        build_variant(source, parse_method(f"mixed-rtn:{method}"), "key", lambda done: None)


def test_every_group_has_the_kl_of_the_whole_model_run_with_it_alone(model):
    samples, effective, groups = texts(), rounded(model), describe_model(model).groups
    expected = {group.names[0]: the_slow_way(model, torch.tensor(samples), effective(group)) for group in groups}
    found = measured(model, samples, effective)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-6)
    assert min(found.values()) > 1e-4
    assert len({round(kl, 6) for kl in found.values()}) == len(found)


def test_the_model_stays_as_it_was_bit_for_bit(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    measured(model, texts(), rounded(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = dict(model.named_modules())
    assert list(now) == list(modules)
    assert all(now[name] is module for name, module in modules.items())
    assert not any(module._forward_hooks for module in now.values())


def test_a_failure_half_way_restores_the_model_too(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = list(model.model.layers)
    right = rounded(model)

    def wrong_in_the_second_layer(group):
        values = right(group)
        return values if group.layer == 0 else values | {group.names[-1]: torch.zeros(3, 5)}

    with pytest.raises(RuntimeError, match="must match"):
        measured(model, texts(), wrong_in_the_second_layer)
    assert list(model.model.layers) == layers
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_group_left_in_float_is_told_but_not_measured(model):
    told = []
    groups = describe_model(model).groups
    first = groups[0].names[0]
    right = rounded(model)
    found = measured(model, texts(), lambda group: {} if group.names[0] == first else right(group), told.append)
    assert first not in found
    assert len(found) == len(groups) - 1
    assert told == [2 - group.layer for group in groups]


def test_weights_that_do_not_change_have_no_kl():
    model = tiny_family("Llama")
    parameters = dict(model.named_parameters())
    found = measured(model, texts(), lambda group: {name: parameters[name].clone() for name in group.names})
    assert set(found.values()) == {0.0}


def test_work_before_a_groups_layer_is_not_done_again():
    model, runs = tiny_family("Llama"), [0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    description, head = describe_model(model), head_of(model)
    runs[:] = [0, 0]
    measure(model, description, head, texts(), rounded(model), lambda done: None)
    in_first = sum(group.layer == 0 for group in description.groups)
    assert runs == [1 + in_first, 1 + len(description.groups)]


def test_only_the_first_samples_and_their_first_tokens_count(monkeypatch):
    monkeypatch.setattr(sensitivity, "SENSITIVITY_LENGTH", 20)
    model, samples = tiny_family("Llama"), texts(SENSITIVITY_SAMPLES + 2, 30)
    cut = [sample[:20] for sample in samples[:SENSITIVITY_SAMPLES]]
    assert measured(model, samples, rounded(model)) == measured(model, cut, rounded(model))
