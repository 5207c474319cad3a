"""What tracing finds in each family: the groups, what takes their scales, the head; and that the scales take back."""

import re
from typing import NamedTuple

import pytest
import torch

from qeval.backends.torch import TorchBackend
from qeval.config import GridRule, Recipe, parse_method
from qeval.errors import QevalError, UsageError
from qeval.models.structure.graph import Fold, describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.trace import LayerTrace
from qeval.models.structure.weight_views import weights_of
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.statistics import collect
from qeval.types import Request
from tests.fixtures.families import FAMILIES, tiny_family
from tests.fixtures.tiny import tiny_llama


class Found(NamedTuple):
    """A group of layer 0: its kind, what takes its scales (a bias too), and where in it."""

    kind: str
    takes: str | None
    rows: tuple[int, int] = (0, 64)
    repeat: int = 1
    plus_one: bool = False
    bias: bool = False


V, UP = "self_attn.v_proj", "mlp.up_proj"
QKV = Found("q/k/v", "input_layernorm")
O_GROUPED = Found("o", V, (0, 32), repeat=2)
GATE_UP = Found("gate/up", "post_attention_layernorm")
DOWN = Found("down", UP, (0, 112))
LLAMA = [QKV, O_GROUPED, GATE_UP, DOWN]
EXPECTED = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Phi3": [
        Found("qkv", "input_layernorm"),
        Found("o", "self_attn.qkv_proj", (128, 64)),
        Found("gate_up", "post_attention_layernorm"),
        Found("down", "mlp.gate_up_proj", (112, 112)),
    ],
    "Gemma": [QKV._replace(plus_one=True), Found("o", V, (0, 16), repeat=4), GATE_UP._replace(plus_one=True), DOWN],
    "Gemma2": [
        QKV._replace(plus_one=True),
        O_GROUPED,
        Found("gate/up", "pre_feedforward_layernorm", plus_one=True),
        DOWN,
    ],
    "Qwen2": [QKV, O_GROUPED._replace(bias=True), GATE_UP, DOWN],
    "Qwen3": LLAMA,
    # attention and the feed-forward run side by side on one input, and a curve lies between fc1 and fc2
    "Phi": [
        Found("q/k/v/fc1", "input_layernorm", bias=True),
        Found("dense", V, (0, 64), bias=True),
        Found("fc2", None),
    ],
    "Granite": LLAMA,
    "Olmo": [Found("q/k/v", None), O_GROUPED, Found("gate/up", None), DOWN],  # its norms have no gain
    "Olmo2": [Found("q/k/v", None), O_GROUPED, Found("gate/up", None), DOWN],  # its norms follow what they norm
    "Cohere": [Found("q/k/v/gate/up", "input_layernorm"), O_GROUPED, DOWN],
    "Phi4-mini": [
        Found("qkv", "input_layernorm"),
        Found("o", "self_attn.qkv_proj", (96, 32), repeat=2),
        Found("gate_up", "post_attention_layernorm"),
        Found("down", "mlp.gate_up_proj", (112, 112)),
    ],
    "StableLm2": [
        Found("q/k/v/gate/up", "input_layernorm", bias=True),
        O_GROUPED._replace(bias=True),
        DOWN,
    ],
    "GPT2": [
        Found("c_attn", "ln_1", bias=True),
        Found("attn.c", "attn.c_attn", (128, 64), bias=True),
        Found("c_fc", "ln_2", bias=True),
        Found("mlp.c", None),
    ],
    "GPTNeoX": [
        Found("query_key_value", "input_layernorm", bias=True),
        Found("dense", "attention.query_key_value", (32, 64), bias=True),  # 16 rows of every 48
        Found("dense_h_to_4h", "post_attention_layernorm", bias=True),
        Found("dense_4h_to_h", None),
    ],
    "Mixtral": [
        QKV,
        O_GROUPED,
        Found("gate_up", "post_attention_layernorm"),
        *(Found("down", f"mlp.experts.gate_up_proj[{expert}]", (112, 112)) for expert in range(4)),
    ],
    "Qwen2Moe": [
        QKV,
        O_GROUPED._replace(bias=True),
        Found("gate/up/gate_up", "post_attention_layernorm"),
        Found("shared_expert.down", "mlp.shared_expert.up_proj", (0, 80)),
        *(Found("experts.down", f"mlp.experts.gate_up_proj[{expert}]", (48, 48)) for expert in range(4)),
    ],
}
ALIKE = {"Llama3": "Llama", "Phi3.5": "Phi3", "Gemma3": "Gemma2", "SmolLM3": "Llama"}
"""Families whose groups are those of another, whatever else differs."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_family(request.param)


def tokens(count, seed=0):
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def as_found(group):
    prefix, fold = f"{layer_of(group.names[0])}.", group.fold
    if fold is None:
        return Found(group.kind, None)
    takes = fold.parameters[0].removeprefix(prefix).removesuffix(".weight")
    assert fold.parameters[1:] in ((), (f"{prefix}{takes}.bias",))
    return Found(group.kind, takes, (fold.offset, fold.rows), fold.repeat, fold.plus_one, len(fold.parameters) == 2)


def layer_of(name):
    return re.match(r".*?\.[01](?=\.)", name)[0]


@pytest.mark.parametrize("name", [*EXPECTED, *ALIKE])
def test_the_groups_of_a_family(name):
    found = describe_model(tiny_family(name))
    for layer in (0, 1):
        assert [as_found(group) for group in found.groups if group.layer == layer] == EXPECTED[ALIKE.get(name, name)]
    assert [layer_of(f"{name}.x") for name in found.layers] == list(found.layers)
    assert (found.head, found.embedding) == {
        "GPT2": ("lm_head.weight", "transformer.wte.weight"),
        "GPTNeoX": ("lm_head.weight", "gpt_neox.embed_in.weight"),
    }.get(name, ("lm_head.weight", "model.embed_tokens.weight"))


def test_a_layers_experts_are_given_their_bits_together_and_its_router_stays_in_float():
    found = describe_model(tiny_family("Qwen2Moe"))
    units = [unit for unit in found.units if unit.layer == 0]
    assert [len(unit.names) for unit in units] == [3, 1, 6, 1, 4]
    entering = next(group for group in found.groups if group.entry)
    assert entering.entry == "model.layers.0.mlp.experts"
    gates = ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight")
    assert entering.followers == tuple(found.float_kinds)[:2] == gates


def test_fused_grouped_queries_fold_into_their_value_rows():
    o = describe_model(tiny_family("Phi3", num_key_value_heads=2)).groups[1]
    assert as_found(o) == Found("o", "self_attn.qkv_proj", (96, 32), repeat=2)


def test_heads_wider_than_the_model_fold_too():
    o = describe_model(tiny_family("Qwen3", head_dim=32)).groups[1]
    assert o.columns == 128
    assert as_found(o) == Found("o", V, (0, 64), repeat=2)


def test_every_linear_of_a_layer_is_in_one_group(model):
    names = [name for group in describe_model(model).groups for name in group.names]
    found = describe_model(model)
    inside = {n for n, w in weights_of(model).items() if w.dim() == 2 and n.startswith(found.layers)}
    assert set(names) | set(found.float_kinds) == inside
    assert len(names) + len(found.float_kinds) == len(inside)


def test_describing_changes_nothing(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert describe_model(model) == describe_model(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_seen(tied):
    assert describe_model(tiny_llama(tie_word_embeddings=tied)).tied is tied


def test_the_head_gives_the_models_own_logits(model):
    ids = torch.tensor([tokens(40)])
    expected = model(ids).logits[0]
    found = head_of(model).logits(model.base_model(ids).last_hidden_state[0])
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_caps_scales_and_biases_are_found():
    assert head_of(tiny_family("Gemma2")).cap == 3.0
    assert head_of(tiny_family("Granite")).scale == 0.25
    assert head_of(tiny_family("Cohere")).scale == 0.25
    assert head_of(tiny_family("Phi")).bias is not None


def test_an_unknown_way_to_logits_is_refused():
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    with pytest.raises(QevalError, match="LlamaForCausalLM turns hidden states into logits in a way"):
        head_of(model)


def test_a_model_without_linears_or_layers_is_refused(monkeypatch):
    model = tiny_llama()
    with (
        monkeypatch.context() as patched,
        pytest.raises(UsageError, match="No linear layers were found in the decoder layers of LlamaForCausalLM"),
    ):
        patched.setattr("qeval.models.structure.graph.trace", lambda *_: LayerTrace([[], []], [0, 1]))
        describe_model(model)
    model.config.num_hidden_layers = 7
    with pytest.raises(UsageError, match="has no list of 7 decoder layers"):
        describe_model(model)


class Exact(NamedTuple):
    """A matrix that is not rounded at all, where a quantized one is expected."""

    matrix: torch.Tensor

    def dequantize(self):
        return self.matrix


def unrounded(model, recipe, monkeypatch):
    """The variant of a recipe, all its scales in place but nothing rounded; every group scaled by magnitude^0.5."""
    monkeypatch.setattr("qeval.quant.awq.ALPHAS", (0.5,))
    monkeypatch.setattr("qeval.quantize.scaling.quantize_rtn", lambda matrix, grid, shares: Exact(matrix))
    description = describe_model(model)
    backend = TorchBackend(model, description, head_of(model), torch.float32)
    samples = [tokens(64, seed=seed) for seed in range(4)]
    statistics = collect(model, description, samples, 0, lambda done: None)
    source = source_of(model, description, backend.head, samples, statistics)
    return backend, build_variant(source, recipe, "key", lambda done: None)


def states(backend, variant):
    with backend.open(variant) as session:
        return session.states([Request(tokens(40, seed=9), tuple(range(40)))])[0]


def assert_scales_change_nothing(model, recipe, monkeypatch):
    backend, variant = unrounded(model, recipe, monkeypatch)
    parameters = weights_of(model)
    changed = [name for name, weight in variant.weights.items() if not torch.equal(weight.matrix, parameters[name])]
    assert set(changed) == set(variant.weights)
    before = states(backend, None)
    assert float((states(backend, variant) - before).abs().max()) <= 1e-5 * float(before.abs().max())
    return variant


def test_input_scales_alone_leave_the_output_as_it_is(model, monkeypatch):
    variant = assert_scales_change_nothing(model, parse_method("awq:g32-noclip"), monkeypatch)
    unfolded = {name for group in describe_model(model).groups if group.fold is None for name in group.names}
    assert all(group.fold or group.is_explicit for group in describe_model(model).groups)
    assert unfolded <= set(variant.input_scales)


def test_scales_that_preceding_weights_take_leave_the_output_as_it_is_too(monkeypatch):
    variant = assert_scales_change_nothing(tiny_family("Llama"), parse_method("awq:g32-noclip-fold"), monkeypatch)
    assert not variant.input_scales
    assert len(variant.floats) == 4


def test_a_group_with_a_linear_in_float_is_scaled_on_its_input(monkeypatch):
    rules = (GridRule("*.up_proj.*", "float"), GridRule("*.k_proj.*", "float"))
    recipe = Recipe("partly", "awq", "int4-g32", clip=False, rules=rules)
    variant = assert_scales_change_nothing(tiny_family("Llama"), recipe, monkeypatch)
    assert {name.rpartition("layers.0.")[2] for name in variant.input_scales if "layers.0." in name} >= {
        "mlp.gate_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.v_proj.weight",
    }
    assert "model.layers.0.mlp.up_proj.weight" in variant.floats  # it takes down's scales, though in float itself


@pytest.mark.parametrize("fold", [Fold(("v",), 4, 4), Fold(("qkv",), 4, 4, head=2, period=6)])
def test_the_rows_that_carry_an_input_are_those_that_its_scales_divide(fold):
    scales = torch.tensor([2.0, 3.0, 5.0, 7.0])
    assert fold.carried(fold.divisors(scales, 12)).tolist() == scales.tolist()
