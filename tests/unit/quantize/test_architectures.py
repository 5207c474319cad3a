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
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.graph import describe_model
from qeval.models.structure.weight_views import weights_of
from qeval.models.tiny import tiny_config, tiny_model
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.fisher import predict
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
    "Dory": set(),
    "HrmText": set(),
    "Zamba2": {"convolution"},
    "Blt": set(),
    "ModernBertDecoder": set(),
    "xLSTM": {"gate"},
    "LongcatFlash": {"router"},
}
NOT_IN_TURN = {"Dory", "HrmText", "Zamba2", "Blt"}
"""What runs layers more than once, shares weights between them, or has several stacks of them."""
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
            for module in twin.modules():
                if isinstance(module, torch.nn.Linear) and module.weight is parameters[name]:
                    module.register_forward_pre_hook(lambda _, args, scales=scales: (args[0] * scales, *args[1:]))
        ids = torch.tensor([bench.request.tokens])
        p, q = (torch.log_softmax(model(ids, use_cache=False).logits[0].double(), -1) for model in (bench.model, twin))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["rtn:g32", "awq:g32", "gptq:g32", "mixed-rtn:g32"])
def test_the_kl_is_that_of_transformers_with_the_same_weights(bench, method):
    variant = bench.variant(method)
    kl = bench.kl(variant)
    assert kl > 1e-4
    assert math.isclose(kl, plain_kl(bench, variant), abs_tol=1e-6)


def test_scales_alone_change_nothing(bench):
    assert CHECKS["folding"](bench)


def test_layers_in_turn_are_the_whole_model(bench):
    """What GPTQ runs layer by layer: shared keys and values, inputs by layer and routers' choices reach each layer."""
    stream = Stream(bench.model, bench.description, bench.samples)
    with torch.inference_mode():
        for _ in bench.description.layers:
            stream.pass_layer()
        whole = [FinalStates(bench.model)(torch.tensor([ids]))[0] for ids in bench.samples]
        assert torch.equal(stream.final_states(), torch.cat(whole))


def test_a_layer_is_calibrated_on_all_that_passes_it():
    """Twice the text where a layer runs twice, or where two layers share a block; a layer of patches has fewer."""
    benches = {name: made(name) for name in NOT_IN_TURN}
    tokens = {}
    for name, bench in benches.items():
        assert not bench.description.in_turn
        groups = bench.description.groups
        with torch.inference_mode():
            found = Stream(bench.model, bench.description, bench.samples).moments(groups)
        tokens[name] = {names[0]: found[names[0]].tokens for names in (group.names for group in groups)}
    text = sum(map(len, benches["Dory"].samples))
    turns = {int(name.split(".")[2]): count // text for name, count in tokens["Dory"].items()}
    assert turns == {0: 1, 1: 2, 2: 2, 3: 1}
    assert {name.split(".")[1]: count // text for name, count in tokens["HrmText"].items()} == {
        "L_module": 4,
        "H_module": 2,
    }
    shared, own = (
        tokens["Zamba2"][f"model.layers.1.{n}.weight"]
        for n in ("shared_transformer.self_attn.q_proj", "mamba_decoder.mamba.in_proj")
    )
    assert (shared, own) == (2 * text, text)
    blt = tokens["Blt"]
    assert 0 < blt["model.global_transformer.layers.0.self_attn.q_proj.weight"] < text
    assert blt["model.local_decoder.layers.0.self_attn.q_proj.weight"] == text


@pytest.mark.parametrize("name", ["Dory", "Zamba2"])
def test_a_matrix_that_runs_twice_moves_the_text_by_both(name):
    """Of a text of one token the prediction is half the square of its gradient times the error."""
    bench = made(name)
    model, token = bench.model, [7]
    group = next(group for group in bench.description.groups if group.names[0].startswith("model.layers.1.s"))
    weights = weights_of(model)
    generator = torch.Generator().manual_seed(1)
    error = {n: torch.randn(weights[n].shape, generator=generator) * 0.01 for n in group.names}
    found = predict(
        model,
        bench.description,
        bench.head,
        [token],
        lambda each: {n: weights[n] + error[n] for n in each.names} if each is group else {},
        lambda _: None,
    )[group.names[0]]

    twin = copy.deepcopy(model).requires_grad_(True)
    log_p = torch.log_softmax(twin(torch.tensor([token]), use_cache=False).logits[0, 0].double(), -1)
    level = torch.rand(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = int(torch.searchsorted(log_p.detach().exp().cumsum(-1), level))
    log_p[label].backward()
    gradients = {n: p.grad for n, p in twin.named_parameters()}
    moved = sum(float((gradients[n] * error[n]).sum()) for n in group.names)
    assert math.isclose(found, moved**2 / 2, rel_tol=1e-3)


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
@pytest.mark.parametrize("bench", sorted(set(ARCHITECTURES) - NOT_IN_TURN), indirect=True)
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
