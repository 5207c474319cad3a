"""KL alone and without, against the whole model run with the weights put in place one way after the other."""

from itertools import islice

import pytest
import torch

from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quantize.ablation import attribute, quantized_groups
from qeval.quantize.sensitivity import SENSITIVITY_SAMPLES
from tests.fixtures.families import tiny_family
from tests.unit.quantize.test_sensitivity import rounded, texts, the_slow_way


@pytest.fixture(params=["Llama", "Gemma2"])
def model(request):
    return tiny_family(request.param)


def attributed(model, samples, effective, known=None, tell=lambda name, kl: None, advance=lambda done: None):
    about = describe_model(model)
    quantized = quantized_groups(about, effective, lambda done: None)
    return attribute(model, about, head_of(model), samples, quantized, known or {}, tell, advance)


def by_sample(model, ids, replaced):
    return tuple(the_slow_way(model, ids[index : index + 1], replaced) for index in range(len(ids)))


def test_both_sides_and_the_joint_are_those_of_the_whole_model(model):
    samples, effective, groups = texts(SENSITIVITY_SAMPLES + 1), rounded(model), describe_model(model).groups
    every = {name: value for group in groups for name, value in effective(group).items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attributed(model, samples, effective)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ids = torch.tensor(samples)
    assert found.joint == pytest.approx(by_sample(model, ids, every), abs=1e-6)
    for group in groups:
        own, name = effective(group), group.names[0]
        rest = {key: value for key, value in every.items() if key not in own}
        assert found.alone[name] == pytest.approx(by_sample(model, ids, own), abs=1e-6)
        assert found.without[name] == pytest.approx(by_sample(model, ids, rest), abs=1e-6)
    assert min(map(sum, found.without.values())) < sum(found.joint)


def test_what_is_known_is_not_measured_again_and_each_figure_is_told_at_once():
    model, samples, told, steps = tiny_family("Llama"), texts(), {}, []
    effective = rounded(model)
    whole = attributed(model, samples, effective, tell=told.__setitem__, advance=steps.append)
    assert len(told) == len(steps) == 1 + 2 * len(describe_model(model).groups)
    known = dict(islice(told.items(), 3))
    again = {}
    assert attributed(model, samples, effective, known, again.__setitem__) == whole
    assert set(again) == set(told) - set(known)
    assert attributed(model, samples, effective, dict.fromkeys(told, (7.0,))).joint == (7.0,)
