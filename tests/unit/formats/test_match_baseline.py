"""A checkpoint's parameters beside the baseline's: biases, in every family that has them."""

import pytest
import torch

from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.formats.match_baseline import BaselineWeights, check_resemblance
from qeval.models.families import tiny_family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.weight_views import weights_of
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.statistics import collect

BIASED = ["Phi", "Qwen2", "StableLm2", "GPT2", "GPTNeoX", "Nemotron"]


@pytest.fixture(scope="module", params=BIASED)
def laid(request):
    """What AWQ makes of a family, as a checkpoint would hold it, and the baseline."""
    model = tiny_family(request.param)
    about = describe_model(model)
    samples = [torch.arange(start, start + 48).mul(37).remainder(256).tolist() for start in range(4)]
    statistics = collect(model, about, samples, 0, lambda count: None)
    source = source_of(model, about, head_of(model), samples, statistics)
    made = build_variant(source, parse_method("awq:int4-g16-asym"), "key", lambda done: None)
    parameters = weights_of(model)
    baseline = BaselineWeights(parameters, about, 16, "model.")
    return {**parameters, **made.floats, **made.weights}, made.input_scales, baseline


def biases(found, baseline):
    return [name for name, each in found.items() if name.endswith("bias") and baseline.parameters[name].dim() == 1]


def test_biases_that_scales_are_folded_into_are_excused(laid):
    found, inputs, baseline = laid
    check_resemblance(found, inputs, baseline)
    assert biases(found, baseline)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda bias: bias.roll(1), lambda bias: -bias])
def test_a_bias_that_is_missing_or_another_is_named(laid, change):
    found, inputs, baseline = laid
    for name in biases(found, baseline)[:4]:
        with pytest.raises(UsageError, match=f"its {name} is not the baseline's: .*quantizers leave a bias"):
            check_resemblance(found | {name: change(found[name])}, inputs, baseline, loose=found)
