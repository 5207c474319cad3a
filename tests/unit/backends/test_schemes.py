"""Schemes in torch's session: against a forward pass written out by hand, with shared prefixes and packed rows."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from qeval.backends.schemes import rounded_inputs
from qeval.backends.sharing import WHOLE, Sharing
from qeval.backends.torch import TorchBackend, TorchSession
from qeval.compare.schemes import with_scheme
from qeval.config import parse_method
from qeval.errors import QevalError, UsageError
from qeval.models.families import FAMILIES, tiny_family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.kv_cache import check_cache
from qeval.models.structure.precision import sums_in_fp32_where_possible
from qeval.models.structure.weight_views import is_expert
from qeval.models.tiny import tiny_config, tiny_model
from qeval.quant.fake_quant import fake_quantize_heads, fake_quantize_rows
from qeval.quant.scheme import parse_format
from qeval.quantize.build import build_variant, source_of
from qeval.types import Request
from tests.fixtures.families import LATENT
from tests.fixtures.tiny import tiny_llama

TOLERANCE = 1e-4
SCHEMES = ["kv-int8", "kv-int4-g8-hadamard", "k-int8-channel+v-fp8-token", "kv-fp8-tensor", "v-mxfp8-rceil"]


def tokens(count, seed=0, vocab=256):
    return tuple(torch.randint(1, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


SAMPLES = [tokens(40, seed=seed) for seed in range(3)]


def backend_of(model):
    return TorchBackend(model, describe_model(model), head_of(model), torch.float32)


def variant_of(model, name):
    """A recipe's variant, as the workshop makes it."""
    recipe, description = parse_method(name), describe_model(model)
    source = source_of(model, description, head_of(model), SAMPLES, {})
    weights = build_variant(
        source, recipe if recipe.method == "none" else recipe.weights_alone, "key", lambda done: None
    )
    return with_scheme(weights, recipe, model, description, SAMPLES, lambda done: None)


def logits_of(session, requests, prefix=()):
    shared = session.prefill(prefix) if prefix else None
    return [session.logits(states) for states in session.states(requests, shared)]


def kl_nats(ours, others):
    """KL at each position, in float64."""
    log_p, log_q = (torch.cat(each).double().log_softmax(-1) for each in (ours, others))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rotary(x, positions, theta=10_000.0):
    size = x.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    return x * angles.cos() + half * angles.sin()


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def llama_by_hand(model, ids, round_keys, round_values):
    """Logits [tokens, vocab] of a Llama, layer by layer, its keys and values rounded after the rotary embedding."""
    config, weights = model.config, model.state_dict()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    x, positions = weights["model.embed_tokens.weight"][list(ids)], torch.arange(len(ids))
    for layer in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f".layers.{layer}." in k}
        h = norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
        q = linear(h, w["self_attn.q_proj.weight"]).view(len(ids), heads, -1).transpose(0, 1)
        k = linear(h, w["self_attn.k_proj.weight"]).view(len(ids), kv_heads, -1).transpose(0, 1)
        v = linear(h, w["self_attn.v_proj.weight"]).view(len(ids), kv_heads, -1).transpose(0, 1)
        q, k = rotary(q, positions), rotary(k, positions)
        k, v = round_keys(k), round_values(v)
        k, v = k.repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -math.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
        x = x + linear(out, w["self_attn.o_proj.weight"])
        h = norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = torch.nn.functional.silu(linear(h, w["mlp.gate_proj.weight"])) * linear(h, w["mlp.up_proj.weight"])
        x = x + linear(gate, w["mlp.down_proj.weight"])
    return linear(norm(x, weights["model.norm.weight"], config.rms_norm_eps), weights["lm_head.weight"])


def int8_loops(heads):
    """INT8 by token and head, one number after the other."""
    rounded = torch.empty_like(heads)
    for head in range(heads.shape[0]):
        for token in range(heads.shape[1]):
            row = heads[head, token].tolist()
            scale = max(map(abs, row)) / 127
            rounded[head, token] = torch.tensor([round(value / scale) * scale for value in row])
    return rounded


def test_rounded_keys_and_values_are_what_a_forward_pass_by_hand_attends_to():
    model, ids = tiny_llama(), tokens(20)
    with backend_of(model).open(variant_of(model, "fp16+kv-int8")) as session:
        (found,) = logits_of(session, [Request(ids, tuple(range(20)))])
    expected = llama_by_hand(model, ids, int8_loops, int8_loops)
    plain = llama_by_hand(model, ids, lambda k: k, lambda v: v)
    assert torch.allclose(found, expected, atol=TOLERANCE)
    assert (plain - expected).abs().max() > 10 * TOLERANCE


def test_activations_alone_are_the_rounded_inputs_of_every_linear_but_the_head():
    model, ids = tiny_llama(), tokens(12)
    with backend_of(model).open(variant_of(model, "fp16+a-int8-token")) as session:
        (found,) = logits_of(session, [Request(ids, tuple(range(12)))])

    def rounded(_, args):
        return (int8_loops(args[0]),)

    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    plain = model(torch.tensor([ids])).logits[0]
    hooks = [module.register_forward_pre_hook(rounded) for module in linears]
    expected = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert torch.allclose(found, expected, atol=TOLERANCE)
    assert (plain - expected).abs().max() > 10 * TOLERANCE


def test_keys_alone_and_values_alone_are_apart():
    model, ids = tiny_llama(), tokens(12)
    q4 = parse_format("int4", "keys")
    for part, of_keys in (("k-int4", True), ("v-int4", False)):
        with backend_of(model).open(variant_of(model, f"none+{part}")) as session:
            (found,) = logits_of(session, [Request(ids, tuple(range(12)))])

        def rounded(heads, of_keys=of_keys):
            return fake_quantize_heads(heads, q4, of_keys=of_keys)

        expected = llama_by_hand(
            model, ids, rounded if of_keys else lambda k: k, rounded if not of_keys else lambda v: v
        )
        assert torch.allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3", "Gemma2", "GPT2", "Mixtral"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_shared_prefix_and_a_packed_row_change_nothing(family, scheme):
    model = tiny_family(family)
    prefix, rests = tokens(13), [tokens(9, 1), tokens(4, 2), tokens(6, 3)]
    after = [Request(rest, tuple(range(len(rest)))) for rest in rests]
    whole = [Request(prefix + rest, tuple(range(len(prefix), len(prefix + rest)))) for rest in rests]
    backend = backend_of(model)
    with backend.open(variant_of(model, f"fp16+{scheme}")) as session:
        changes = session._kv_changes
        shared = logits_of(session, after, prefix)
        packed = logits_of(session, whole)
        alone = [logits_of(session, [each])[0] for each in whole]
        apart = TorchSession(model, sharing=Sharing(), kv_changes=changes)
        padded = logits_of(apart, whole)
        copied = logits_of(apart, after, prefix)
        unshared = logits_of(TorchSession(model, sharing=WHOLE, kv_changes=changes), after, prefix)
    with backend.open(None) as session:
        plain = logits_of(session, whole)
    loss = kl_nats(plain, alone).mean()
    for found in (shared, packed, padded, copied, unshared):
        # a number at the border between two codes may go to either, so the KL counts, not each logit
        assert kl_nats(alone, found).max() < min(1e-4, loss / 10)


def test_a_continuation_reads_rounded_keys_and_values():
    model, ids = tiny_llama(), tokens(10)
    with backend_of(model).open(variant_of(model, "fp16+kv-int4")) as session:
        said = session.greedy([ids], 4)[0].tolist()
        for step in range(4):
            whole = (*ids, *said[:step])
            (logits,) = logits_of(session, [Request(whole, (len(whole) - 1,))])
            assert int(logits.argmax()) == said[step]


def test_a_prefix_of_a_prefix_is_rounded_once():
    model = tiny_llama()
    with backend_of(model).open(variant_of(model, "fp16+kv-int4")) as session:
        outer = session.prefill(tokens(7))
        inner = session.prefill(tokens(5, 1), outer)
        found = session.states([Request(tokens(4, 2), (0, 3))], inner)[0]
        whole = session.states([Request(tokens(7) + tokens(5, 1) + tokens(4, 2), (12, 15))])[0]
    assert torch.allclose(found, whole, atol=TOLERANCE)


def test_ggml_blocks_and_a_rotation_in_a_model_with_heads_of_64():
    model, ids = tiny_llama(head_dim=64), tokens(12)
    how = parse_format("q4_0-hadamard", "keys")
    with backend_of(model).open(variant_of(model, "fp16+kv-q4_0-hadamard")) as session:
        (found,) = logits_of(session, [Request(ids, tuple(range(12)))])
    expected = llama_by_hand(
        model,
        ids,
        lambda k: fake_quantize_heads(k, how, of_keys=True),
        lambda v: fake_quantize_heads(v, how, of_keys=False),
    )
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_static_ranges_of_keys_and_values_are_those_of_the_calibration_text():
    model = tiny_llama()
    variant = variant_of(model, "fp16+k-int8-channel+v-fp8-tensor")
    seen = {"k": [], "v": []}

    def keep(name):
        def look(heads):
            seen[name].append(heads)
            return heads

        return look

    for sample in SAMPLES:
        llama_by_hand(model, sample, keep("k"), keep("v"))
    for layer in range(2):
        keys = torch.stack(seen["k"][layer::2]).abs().amax(dim=(0, 2)).unsqueeze(1)
        values = torch.stack(seen["v"][layer::2]).abs().amax()
        assert torch.allclose(variant.ranges[f"{layer}.keys"], keys, rtol=1e-5)
        assert torch.allclose(variant.ranges[f"{layer}.values"], values, rtol=1e-5)
    assert len(variant.ranges) == 4


def test_w8a8_is_an_integer_product():
    model, ids = tiny_llama(), tokens(11)
    variant, calls = variant_of(model, "int8-w8a8"), []
    module = model.model.layers[1].mlp.down_proj
    with backend_of(model).open(variant) as session:
        raw = []
        first = module.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
        last = module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
        logits_of(session, [Request(ids, (10,))])
        first.remove(), last.remove()
    weight = variant.weights["model.layers.1.mlp.down_proj.weight"]
    (rounded, output) = calls[0]
    scales = rounded[0].abs().amax(-1).double() / 127
    codes = (rounded[0].double() / scales.unsqueeze(1)).round().long()
    assert codes.abs().max() == 127
    products = codes @ (weight.codes.long() - weight.grid.zero).T
    expected = products.double() * scales.unsqueeze(1) * weight.scales.double().T
    assert torch.allclose(output[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_linears_that_read_one_tensor_have_it_rounded_once(monkeypatch):
    model, count = tiny_llama(), []
    from qeval.backends import schemes

    rounding = schemes.fake_quantize_rows
    monkeypatch.setattr(schemes, "fake_quantize_rows", lambda *args: count.append(1) or rounding(*args))
    with backend_of(model).open(variant_of(model, "int8-w8a8")) as session:
        logits_of(session, [Request(tokens(5), (4,))])
    assert len(count) == 2 * 4  # of two layers: q, k, v; o; gate, up; down


@pytest.mark.parametrize("name", ["int8-w8a8+kv-int8", "rtn:g32+a-fp8-static", "rtn:g32+a-nvfp4+k-int8-channel"])
def test_everything_is_as_it_was_after_the_block(name):
    model = tiny_llama()
    backend, before = backend_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    request = [Request(tokens(9), (8,))]
    with backend.open(None) as session:
        plain = logits_of(session, request)[0]
    with backend.open(variant_of(model, name)) as session:
        changed = logits_of(session, request)[0]
    assert not torch.equal(plain, changed)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with backend.open(None) as session:
        assert torch.equal(plain, logits_of(session, request)[0])


def test_padding_and_the_batch_change_no_rounded_activation():
    model = tiny_llama()
    requests = [Request(tokens(count, count), (count - 1,)) for count in (17, 3, 9)]
    with backend_of(model).open(variant_of(model, "rtn:g32+a-mxfp4-rceil+kv-int4")) as session:
        alone = [logits_of(session, [each])[0] for each in requests]
        together = logits_of(session, requests)
        padded = logits_of(TorchSession(model, sharing=Sharing(), kv_changes=session._kv_changes), requests)
    for found in (together, padded):
        assert kl_nats(alone, found).max() < 1e-4


def test_awq_scales_are_multiplied_before_an_input_is_rounded():
    model = tiny_llama()
    variant = variant_of(model, "rtn:int8-channel+a-int8-static")
    name = "model.layers.0.mlp.down_proj.weight"
    scaled = replace(variant, input_scales={name: torch.full((112,), 0.5)})
    seen = []
    module = model.model.layers[0].mlp.down_proj
    with backend_of(model).open(scaled) as session:
        hook = module.register_forward_hook(lambda _, args, output: seen.append(args[0]))
        logits_of(session, [Request(tokens(9), (8,))])
        hook.remove()
    codes = seen[0] / (variant.ranges[name] / 127)
    assert torch.allclose(codes, codes.round(), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_attention_is_known(family):
    model = tiny_family(family)
    config = model.config.get_text_config()
    before = config._attn_implementation
    shapes = check_cache(model)
    assert len(shapes) == config.num_hidden_layers
    assert config._attn_implementation == before


def test_latents_are_refused():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from qeval.models.families import SIZES

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **LATENT})).eval()
    with pytest.raises(UsageError, match="latents"):
        check_cache(model)


def test_attention_beside_the_interface_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)).eval()
    with pytest.raises(UsageError, match="can't round"):
        check_cache(model)


def test_a_linear_that_no_calibration_token_reached_is_named():
    model = tiny_llama()
    recipe, description = parse_method("rtn:g32+a-int8-static"), describe_model(model)
    source = source_of(model, description, head_of(model), (), {})
    weights = build_variant(source, recipe.weights_alone, "key", lambda done: None)
    with pytest.raises(QevalError, match=r"reached model\.layers\.0\.self_attn\.q_proj\.weight \(14 in all\)"):
        with_scheme(weights, recipe, model, description, (), lambda done: None)


def experts_by_hand(experts, hidden, chosen, shares, how, amax):
    """What a layer's experts give, one after the other, with the inputs of both of their products rounded."""
    found = torch.zeros_like(hidden)
    for index, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        gate, up = linear(fake_quantize_rows(hidden[rows], how, amax), gate_up).chunk(2, -1)
        inner = fake_quantize_rows(experts.act_fn(gate) * up, how, amax)
        found.index_add_(0, rows, linear(inner, down) * shares[rows, places].unsqueeze(-1))
    return found


@pytest.mark.parametrize("name", ["int8-token", "fp8-tensor", "mxfp4-rceil"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_inputs_of_experts_in_stacks_are_rounded_before_both_products(family, name):
    model, how = tiny_family(family), parse_format(name, "activations")
    experts = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    names = [each for group in describe_model(model).groups for each in group.names if is_expert(each)]
    amax = torch.tensor(0.7) if how.is_static else None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, experts.gate_up_proj.shape[-1], generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(12)])
    shares = torch.rand(12, 2, generator=generator)
    ranges = {} if amax is None else dict.fromkeys(names, amax)
    plain = experts(hidden, chosen, shares)
    with rounded_inputs(model, dict.fromkeys(names, how), ranges, torch.device("cpu")), torch.inference_mode():
        found = experts(hidden, chosen, shares)
        expected = experts_by_hand(experts, hidden, chosen, shares, how, amax)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert torch.equal(experts(hidden, chosen, shares), plain)


def test_inputs_of_experts_that_are_multiplied_all_at_once_are_rounded():
    model, how = tiny_model(tiny_config("llama4_text")), parse_format("int8-token", "activations")
    experts = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    names = [each for group in describe_model(model).groups for each in group.names if is_expert(each)]
    hidden = torch.randn(len(experts.gate_up_proj), 5, experts.hidden_size, generator=torch.Generator().manual_seed(0))
    with rounded_inputs(model, dict.fromkeys(names, how), {}, torch.device("cpu")), torch.inference_mode():
        found = experts(hidden.flatten(0, 1))
        gate, up = torch.bmm(fake_quantize_rows(hidden, how), experts.gate_up_proj).chunk(2, -1)
        expected = torch.bmm(fake_quantize_rows(experts.act_fn(gate) * up, how), experts.down_proj)
    assert torch.allclose(found, expected.flatten(0, 1), atol=1e-6)
    assert not torch.allclose(found, experts(hidden.flatten(0, 1)), atol=1e-4)


def test_a_mixtures_static_ranges_are_its_experts_own():
    model = tiny_family("Mixtral")
    variant = variant_of(model, "rtn:int8-channel+a-int8-static")
    assert {name for name in variant.ranges if is_expert(name)} == {name for name in variant.weights if is_expert(name)}
    request, found = [Request(tokens(20), tuple(range(20)))], []
    for each in (variant, variant.weights_alone):
        with backend_of(model).open(each) as session:
            found.append(logits_of(session, request))
    assert 0 < kl_nats(*found).mean() < 0.1


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_half_precision_keeps_its_types(family):
    model = tiny_family(family).to(torch.bfloat16)
    sums_in_fp32_where_possible(model)
    ids, prefix = tokens(9), tokens(6, 1)
    whole, after = [Request(prefix + ids, (14,))], [Request(ids, (8,))]
    with backend_of(model).open(variant_of(model, "rtn:int8-channel+a-int8+kv-int8")) as session:
        alone, shared = logits_of(session, whole), logits_of(session, after, prefix)
    with backend_of(model).open(None) as session:
        plain = logits_of(session, whole)
    assert kl_nats(alone, shared).max() < 0.02
    assert kl_nats(plain, alone).max() < 0.1
