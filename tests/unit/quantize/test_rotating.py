"""Rotations fold exactly, family by family, and quantize as a model does that is rotated and rounded by hand."""

import copy

import pytest
import torch

from qeval.backends.torch import TorchBackend
from qeval.compare.schemes import with_scheme
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.trace import probe
from qeval.quant.rotation import random_rotation
from qeval.quant.scheme import parse_rotation
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.rotating import rotated_model
from qeval.quantize.statistics import collect
from qeval.types import Request
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import tiny_llama

SAMPLES = [tuple(torch.randint(1, 256, (40,), generator=torch.Generator().manual_seed(n)).tolist()) for n in range(3)]
REQUEST = [Request(SAMPLES[0], tuple(range(40)))]
SANDWICH = "post_attention_layernorm.weight, model.layers.0.post_feedforward_layernorm.weight"


def rotated(model, name):
    return rotated_model(model, describe_model(model), head_of(model), parse_rotation(name))


def loud(model):
    """The model with outliers: rows of its embedding and gains of its norms that are far larger than others."""
    model.model.embed_tokens.weight[:, 5] *= 20
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] = 30.0
        layer.post_attention_layernorm.weight[7] = 30.0
        layer.mlp.down_proj.weight[:, 11] *= 10
    return model


@pytest.mark.parametrize(
    "family", ["Llama", "Llama3", "Qwen2", "Qwen3", "Gemma", "Phi3", "Granite", "Mixtral", "Qwen2Moe"]
)
def test_folding_leaves_the_logits_as_they_were(family):
    model = tiny_family(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, states = head_of(model).logits(probe(model)), probe(model)
    with rotated(model, "r1r2-seed4") as turned:
        others = probe(model)
        assert (others - states).abs().max() > 0.1 * states.abs().max()
        assert (turned.head.logits(others) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert turned.has_own_head
        assert not turned.description.tied
        norms = [value for name, value in model.named_parameters() if name.endswith("layernorm.weight")]
        assert all(len(value.unique()) == 1 for value in norms)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi", "GPT2", "GPTNeoX", "Olmo2"])
def test_values_and_inner_inputs_are_turned_exactly_where_the_stream_is_not(family):
    model = tiny_family(family)
    logits = head_of(model).logits(probe(model))
    with rotated(model, "r2r4") as turned:
        assert not turned.has_own_head
        assert len(turned.inputs) == 2
        assert (turned.head.logits(probe(model)) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert all(len(core) == 28 for core in turned.inputs.values())


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("Phi", "r1", "model.layers.0.input_layernorm adds a bias, as a LayerNorm does"),
        ("Cohere", "r1", "input_layernorm does more than divide by the root of the mean square"),
        ("Olmo", "r1", "no norm with a gain comes before model.layers.0.self_attn.q_proj.weight"),
        ("Olmo2", "r1r2", "no norm with a gain comes before"),
        ("Gemma3", "r1", SANDWICH),
        ("Mixtral", "r1r4", "its experts lie in stacks"),
    ],
)
def test_a_family_that_does_not_turn_is_refused_with_the_reason(family, name, reason):
    model = tiny_family(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"can't be rotated") as refused, rotated(model, name):
        pass
    assert reason in str(refused.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_does_something_else_with_its_stream_is_refused():
    model = tiny_llama()
    model.model.layers[1].register_forward_hook(lambda _, __, output: output.clamp(-0.5, 0.5))
    with pytest.raises(UsageError, match="its logits would move by"), rotated(model, "r1"):
        pass


def variant_of(model, name):
    """A recipe's variant, as a workshop makes it."""
    recipe, description, head = parse_method(name), describe_model(model), head_of(model)
    statistics = collect(model, description, SAMPLES, 0, int) if recipe.needs_statistics else {}
    if recipe.rotations is None:
        weights = build_variant(
            source_of(model, description, head, SAMPLES, statistics), recipe.weights_alone, "k", int
        )
        return with_scheme(weights, recipe, model, description, SAMPLES, int)
    with rotated_model(model, description, head, recipe.rotations) as turned:
        if recipe.needs_statistics:
            statistics = collect(model, turned.description, SAMPLES, 0, int)
        source = source_of(model, turned.description, turned.head, SAMPLES, statistics)
        weights = turned.completed(build_variant(source, recipe.weights_alone, "k", int))
    return with_scheme(weights, recipe, model, description, SAMPLES, int)


def logits_of(model, variant=None):
    """Log-probabilities [tokens, vocab] of a variant in the session that scores it."""
    backend = TorchBackend(model, describe_model(model), head_of(model), torch.float32)
    with backend.open(variant) as session:
        return session.logits(session.states(REQUEST)[0]).double().log_softmax(-1)


def divergence(first, second):
    return float((first.exp() * (first - second)).sum(-1).mean())


def kl(model, name):
    """Mean KL of a recipe's variant from the model, in nats."""
    return divergence(logits_of(model), logits_of(model, variant_of(model, name)))


def whole(rotation):
    """A rotation's matrix by Kronecker's product, fp64."""
    left = torch.ones(1, 1, dtype=torch.float64)
    while len(left) < rotation.size // len(rotation.core):
        left = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), left)
    return rotation.signs.diag() @ torch.kron(left / len(left) ** 0.5, rotation.core)


def rotate_by_hand(model, seed, *, online):
    """A Llama or Qwen2 with R1, R2 (and R4) written out; its head is a matrix of its own."""
    model, config = copy.deepcopy(model).double(), model.config
    stream = whole(random_rotation(64, seed))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * model.model.norm.weight @ stream, False)
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight @ stream, False)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.copy_(linear.weight * layer.input_layernorm.weight @ stream)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight * layer.post_attention_layernorm.weight @ stream)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(stream.T @ linear.weight)
        head = whole(random_rotation(16, seed + 1 + index))
        values = torch.block_diag(*[head] * config.num_key_value_heads)
        attention.v_proj.weight.copy_(values.T @ attention.v_proj.weight)
        if attention.v_proj.bias is not None:
            attention.v_proj.bias.copy_(attention.v_proj.bias @ values)
        attention.o_proj.weight.copy_(attention.o_proj.weight @ torch.block_diag(*[head] * config.num_attention_heads))
        if online:
            inner = whole(random_rotation(112, seed, signs=False))
            mlp.down_proj.weight.copy_(mlp.down_proj.weight @ inner)
            mlp.down_proj.register_forward_pre_hook(lambda _, args, q=inner: (args[0] @ q.float(),))
    return model.float()


def round_by_hand(model, *, inputs):
    """INT4 weights with a scale a row, and with `inputs` INT4 inputs with a scale a token."""

    def rounded(rows):
        step = rows.abs().amax(-1, keepdim=True) / 7
        return torch.clamp(torch.round(rows / step), -8, 7) * step

    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight))
                if inputs:
                    module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny_llama, "rtn:int4-channel-full+r1r2"),
        (lambda: tiny_llama(tie_word_embeddings=True), "rtn:int4-channel-full+r1r2-seed2"),
        (lambda: tiny_family("Qwen2"), "rtn:int4-channel-full+r1r2+a-int4-token"),
        (lambda: tiny_family("Qwen2"), "rtn:int4-channel-full+r1r2r4+a-int4-token"),
    ],
)
def test_the_kl_is_that_of_a_model_rotated_and_rounded_by_hand(make, name):
    model, recipe = make(), parse_method(name)
    turned = rotate_by_hand(model, recipe.rotations.seed, online=recipe.rotations.online)
    base = model(input_ids=torch.tensor([SAMPLES[0]])).logits[0].double().log_softmax(-1)
    exact = turned(input_ids=torch.tensor([SAMPLES[0]])).logits[0].double().log_softmax(-1)
    assert divergence(base, exact) < 1e-9
    by_hand = round_by_hand(turned, inputs=recipe.activations is not None)
    expected = divergence(base, by_hand(input_ids=torch.tensor([SAMPLES[0]])).logits[0].double().log_softmax(-1))
    assert expected > 1e-3
    assert kl(model, name) == pytest.approx(expected, abs=1e-6)


def test_outliers_cost_less_once_they_are_spread():
    model = loud(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert kl(model, "rtn:int4-channel+r1r2") < kl(model, "rtn:int4-channel")
    assert kl(model, "rtn:int8-channel+r1r2+a-int4") < 0.8 * kl(model, "rtn:int8-channel+a-int4")
    assert kl(model, "rtn:int8-channel+r1r2r4+a-int4") < kl(model, "rtn:int8-channel+r1r2+a-int4")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["gptq:int4-channel", "awq:g32", "smoothquant", "mixed-rtn:g32"])
def test_calibration_sees_the_rotated_model(method):
    model = loud(tiny_llama())
    turned = rotate_by_hand(model, 0, online=False)
    base, expected = logits_of(model), logits_of(turned, variant_of(turned, method))
    found = logits_of(model, variant_of(model, f"{method}+r1r2"))
    assert divergence(base, found) == pytest.approx(divergence(base, expected), rel=0.05)


@pytest.mark.parametrize("method", ["gptq:int4-channel", "awq:g32", "smoothquant:int8-channel"])
def test_inputs_turned_while_running_are_what_methods_and_static_ranges_see(method):
    model = tiny_llama()
    variant = variant_of(model, f"{method}+r1r2r4+a-int8-static")
    down = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
    assert list(variant.input_rotations) == down
    seen = []
    turned = rotate_by_hand(model, 0, online=True)
    turned.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    for sample in SAMPLES:
        turned(input_ids=torch.tensor([sample]))
    scales = variant.input_scales.get(down[0], torch.ones(1))
    assert float(variant.ranges[down[0]]) == pytest.approx(float(max(seen)), rel=0.3 if scales.numel() > 1 else 0.15)
    assert divergence(logits_of(model), logits_of(model, variant)) < 1.0


def test_a_tied_head_is_counted_once_it_is_a_matrix_of_its_own():
    model = tiny_llama(tie_word_embeddings=True)
    plain, turned = variant_of(model, "rtn:g32"), variant_of(model, "rtn:g32+r1")
    assert turned.size_bytes(16) == plain.size_bytes(16) + 256 * 64 * 2
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= turned.floats.keys()
    assert turned.details["head"].startswith("was tied with the embedding")
    quantized = variant_of(model, "rtn:g32-head+r1")
    assert "lm_head.weight" in quantized.weights
    assert "lm_head.weight" not in quantized.floats
    assert divergence(logits_of(model), logits_of(model, quantized)) < 2 * divergence(
        logits_of(model), logits_of(model, variant_of(model, "rtn:g32-head"))
    )


def test_weights_that_rules_leave_in_float_are_turned_too():
    model = tiny_llama()
    description, head = describe_model(model), head_of(model)
    with rotated_model(model, description, head, parse_rotation("r1r2r4")) as turned:
        recipe = parse_method("rtn:int8-channel")
        source = source_of(model, turned.description, turned.head, (), {})
        built = build_variant(source, recipe, "k", int)
        names = [name for name in built.weights if "down_proj" not in name and "v_proj" not in name]
        part = type(built)(**{**vars(built), "weights": {name: built.weights[name] for name in names}})
        variant = turned.completed(part)
    assert {f"model.layers.0.{name}.weight" for name in ("mlp.down_proj", "self_attn.v_proj")} <= variant.floats.keys()
    assert divergence(logits_of(model), logits_of(model, variant)) < 1e-3
