"""Quantizing architectures that do more than attend: what is found, what stays in float, and what the result scores."""

import copy
import math

import pytest
import torch

from qeval.config import GridRule, Recipe, parse_method
from qeval.errors import UsageError
from qeval.jobs.conformance import CHECKS, Bench
from qeval.methods import FLOAT_REASONS
from qeval.models.silence_transformers import quiet
from qeval.models.structure.graph import describe_model
from qeval.models.structure.weight_views import weights_of
from qeval.models.tiny import tiny_config, tiny_model
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.patching import layers_of
from qeval.quantize.sequential import Stream
from tests.fixtures.architectures import ARCHITECTURES, tiny_architecture

KINDS = {
    "Mamba": {"convolution", "decay"},
    "Mamba2": {"convolution"},
    "Jamba": {"convolution", "decay", "router"},
    "NemotronH": {"convolution", "router"},
    "FalconH1": {"convolution"},
    "GraniteMoeHybrid": {"convolution", "router"},
    "Lfm2": {"convolution"},
    "Qwen3Next": {"convolution", "gate", "router"},
    "Qwen3_5": {"convolution", "gate"},
    "KimiLinear": {"convolution", "gate", "router"},
    "MiniMax": {"router"},
    "DeepseekV32": {"indexer", "router"},
    "GlmMoeDsa": {"indexer", "router"},
    "GptOss": {"router"},
    "Llama4": {"router"},
    "Gemma3n": {"gate", "router"},
    "Gemma4": {"router"},
}
TRANSPOSED = ("GptOss", "Llama4")
"""What keeps its experts as [experts, inputs, outputs]."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def bench(request):
    return made(request.param)


@pytest.fixture(scope="module")
def gemma3n():
    return made("Gemma3n")


def made(name):
    with quiet():
        bench = Bench(name, tiny_architecture(name))
    bench.samples = [sample[:24] for sample in bench.samples[:4]]
    return bench


def test_what_stays_in_float_has_a_kind(bench):
    description = bench.description
    assert set(description.float_kinds.values()) == KINDS[bench.name]
    linears = {name for group in description.groups for name in group.names}
    assert linears.isdisjoint(description.float_kinds)
    assert len(linears) == sum(len(group.names) for group in description.groups)
    kept = {weight.name: weight.reason for weight in bench.variant("rtn:g32").kept}
    for name, reason in kept.items():
        layer = next((layer for layer in description.layers if name.startswith(f"{layer}.")), None)
        assert layer is None or reason in FLOAT_REASONS.values() or reason.startswith("not a matrix"), name


def plain_kl(bench, variant):
    """The KL of a loop without qeval: transformers' own model with the same values written over its weights."""
    twin = copy.deepcopy(bench.model)
    parameters = dict(twin.named_parameters())
    with torch.inference_mode():
        values = {name: weight.dequantize() for name, weight in variant.weights.items()}
        for name, value in {**values, **variant.floats}.items():
            stack, _, index = name.removesuffix("]").partition("[")
            target = parameters[stack][int(index)] if index else parameters[stack]
            target.copy_(value.T if index and bench.name in TRANSPOSED else value)
        for name, scales in variant.input_scales.items():
            module = twin.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(lambda _, args, scales=scales: (args[0] * scales, *args[1:]))
        ids = torch.tensor([bench.request.tokens])
        p, q = (torch.log_softmax(model(ids, use_cache=False).logits[0].double(), -1) for model in (bench.model, twin))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["awq:g32", "gptq:g32"])
def test_the_kl_is_that_of_transformers_with_the_same_weights(bench, method):
    variant = bench.variant(method)
    kl = bench.kl(variant)
    assert kl > 1e-3
    assert math.isclose(kl, plain_kl(bench, variant), abs_tol=1e-6)


def test_scales_alone_change_nothing(bench):
    assert CHECKS["folding"](bench)


def test_layers_in_turn_are_the_whole_model(bench):
    """What GPTQ runs layer by layer: shared keys and values, inputs by layer and routers' choices reach each layer."""
    stream = Stream(bench.model, layers_of(bench.model, bench.description), bench.samples)
    with torch.inference_mode():
        for _ in bench.description.layers:
            stream.pass_layer()
        whole = [
            bench.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state for ids in bench.samples
        ]
        assert torch.equal(stream.final_states(), torch.cat(whole, 1)[0])


@pytest.mark.parametrize("name", ["NemotronH", "Qwen3Next", "GptOss"])
def test_bits_are_mixed_by_predicted_sensitivities_too(name):
    bench = made(name)
    bench.samples *= 2  # four to choose on, and others to accept on
    variant = bench.variant("mixed-rtn:g32-fisher")
    assert {choice.bits for choice in variant.choices} == {4, 8}
    assert 0 < bench.kl(variant) < bench.kl(bench.variant("rtn:g32"))


def test_matrices_with_rows_shorter_than_a_block_stay_in_float_where_they_are_few(gemma3n):
    bench = gemma3n
    variant = bench.variant("mixed-rtn:g32")
    small = {weight.name for weight in variant.kept if weight.reason == FLOAT_REASONS["small"]}
    assert small == {f"model.layers.{layer}.altup.prediction_coefs.weight" for layer in range(3)}
    channel = bench.variant("rtn:int4-channel")
    assert small <= set(channel.weights)

    # a block that no row fits is the user's mistake, and so is a rule that names the matrix
    with pytest.raises(UsageError, match="Blocks of 128 are larger than a row of"):
        bench.variant("rtn:g128")
    rule = GridRule("*prediction_coefs*", "int4-g32")
    source = source_of(bench.model, bench.description, bench.head, (), {})
    with pytest.raises(
        UsageError, match=r"Blocks of 32 are larger than a row of .*prediction_coefs.weight \(4 weights\)"
    ):
        build_variant(source, Recipe("named", "rtn", "int4-g32", rules=(rule,)), "key", lambda _: None)


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "deepseek_v4"])
def test_routers_that_hold_more_than_a_weight_are_routers(model_type):
    """Ernie's has a module of biases inside; DeepSeek-V4's is no Linear. Both take their experts' scales."""
    with quiet():
        description = describe_model(tiny_model(tiny_config(model_type)), folds=False)
    router = "model.layers.1.mlp.gate.weight"
    assert description.float_kinds[router] == "router"
    (entering,) = (group for group in description.groups if group.entry and group.layer == 1)
    assert router in entering.followers


def test_experts_that_lie_transposed_are_seen_as_others_are():
    model = tiny_architecture("GptOss")
    stack = model.model.layers[0].mlp.experts.down_proj
    view = weights_of(model)["model.layers.0.mlp.experts.down_proj[2]"]
    assert view.shape == (64, 112)
    assert torch.equal(view, stack[2].T)
    view[3].fill_(7)
    assert bool((stack[2][:, 3] == 7).all())


@pytest.mark.slow
@pytest.mark.parametrize("check", ["rtn", "awq", "gptq", "mixed", "scoring"])
def test_an_architecture_does_all_that_is_promised(bench, check):
    assert CHECKS[check](bench)


def test_a_recipe_of_formats_leaves_small_matrices_in_float_too(gemma3n):
    bench = gemma3n
    recipe = parse_method("mixed-rtn:int4-g32/int8-g32-6bpw")
    source = source_of(bench.model, bench.description, bench.head, bench.samples, {})
    variant = build_variant(source, recipe, "key", lambda _: None)
    assert {w.reason for w in variant.kept if "prediction_coefs" in w.name} == {FLOAT_REASONS["small"]}
    assert len({choice.format for choice in variant.choices}) == 2
