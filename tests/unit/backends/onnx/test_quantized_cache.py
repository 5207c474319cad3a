"""Keys and values on GroupQueryAttention's integers: the kernel beside torch."""

import json
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

import onnx_ir as ir

from qeval.backends.onnx.backend import OrtBackend
from qeval.backends.onnx.cache_format import cache_format
from qeval.backends.onnx.insert_cache import quantize_caches
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.serving import read_served
from qeval.errors import QevalError, UsageError
from qeval.metrics.tokens import near_kl
from qeval.models.structure.forward import run_samples
from qeval.quant.fake_quant import fake_quantize_heads
from qeval.quant.floats import largest_magnitude
from qeval.quant.scheme import Scheme, parse_format, scheme_of
from qeval.quantize.ranges import collect_ranges
from qeval.types import Request
from tests.fixtures.onnx import (
    exporter,
    graph_of,
    loaded,
    made,
    ort_session,
    product_graph,
    session_of,
    shared_home,
    torch_backend,
    value,
)

HEADS, GROUPS, SIZE = 4, 2, 32
FORMATS = ("int8-tensor-ort", "int8-channel-ort", "int4-tensor-ort", "int4-channel-ort")


class Outputs(NamedTuple):
    """The outputs of one node of attention: [1, tokens, width], and the codes of keys and values."""

    attended: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def attend(how, query, key, cached, key_range, value_range):
    """Run one GroupQueryAttention node on heads [1, heads, tokens, size], on integers that `how` says."""
    integer, size = (ir.DataType.INT8, SIZE) if how.bits == 8 else (ir.DataType.UINT8, SIZE // 2)
    names = ("query", "key", "value")
    inputs = {name: value(name, [1, "s", "w"]) for name in names}
    inputs |= {name: value(name, [1, GROUPS, "p", size], integer) for name in ("past_key", "past_value")}
    inputs["last"] = value("last", [1], ir.DataType.INT32)
    inputs["total"] = value("total", [], ir.DataType.INT32)
    inputs |= {name: value(name, ["n"]) for name in ("key_scale", "value_scale")}
    given = list(inputs.values())
    kind = "PER_TENSOR" if how.span == "tensor" else "PER_CHANNEL"
    attributes = {"num_heads": HEADS, "kv_num_heads": GROUPS, "kv_cache_bit_width": how.bits}
    node = ir.node(
        "GroupQueryAttention",
        [*given[:7], *[None] * 5, *given[7:]],
        {**attributes, "k_quant_type": kind, "v_quant_type": kind},
        domain="com.microsoft",
        num_outputs=3,
    )
    for output, name, dtype in zip(node.outputs, "okv", (ir.DataType.FLOAT, integer, integer), strict=True):
        output.name, output.type = name, ir.TensorType(dtype)
    empty = np.zeros((1, GROUPS, 0, size), integer.numpy())
    tokens = query.shape[2]
    rows = (heads.transpose(1, 2).flatten(2).numpy() for heads in (query, key, cached))
    feeds = dict(zip(names, rows, strict=True)) | {
        "past_key": empty,
        "past_value": empty,
        "last": np.array([tokens - 1], np.int32),
        "total": np.array(tokens, np.int32),
        "key_scale": (key_range / (1 << (how.bits - 1))).flatten().numpy(),
        "value_scale": (value_range / (1 << (how.bits - 1))).flatten().numpy(),
    }
    outputs = session_of(graph_of(given, list(node.outputs), [node], [])).run(None, feeds)
    attended, keys, values = (torch.from_numpy(array) for array in outputs)
    return Outputs(attended, unpacked(keys, how.bits), unpacked(values, how.bits))


def unpacked(codes, bits):
    """Two codes a byte at 4 bits, the low one first, 8 more than they are."""
    if bits == 8:
        return codes.float()
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float() - 8


def range_of(heads, how):
    if how.span == "tensor":
        return heads.abs().max()
    return largest_magnitude(heads.permute(1, 3, 0, 2).flatten(2)).unsqueeze(1)


def heads_of(count, tokens, seed):
    return torch.randn(1, count, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMATS)
def test_attention_of_the_kernel_is_that_over_rounded_heads(name):
    how = parse_format(name, "keys")
    query, key, cached = heads_of(HEADS, 40, 0), heads_of(GROUPS, 40, 1), heads_of(GROUPS, 40, 2)
    ranges = range_of(key, how) * 0.9, range_of(cached, how)  # some keys saturate
    found = attend(how, query, key, cached, *ranges)

    ours = [
        fake_quantize_heads(heads, how, amax, of_keys=of_keys)
        for heads, amax, of_keys in zip((key, cached), ranges, (True, False), strict=True)
    ]
    for codes, rounded, amax in zip((found.keys, found.values), ours, ranges, strict=True):
        assert torch.equal(codes * (amax / (1 << (how.bits - 1))), rounded)
    assert found.keys.min() == -(1 << (how.bits - 1))
    expected, of_floats = (
        scaled_dot_product_attention(query, *pair, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        for pair in (ours, (key, cached))
    )
    assert (found.attended - expected).abs().max() < 1e-5
    assert (found.attended - of_floats).abs().max() > 1e-3


@pytest.mark.parametrize("name", FORMATS[:3:2])
def test_ties_go_where_the_kernel_has_them(name):
    how = parse_format(name, "keys")
    codes = torch.randint(-120, 120, (1, GROUPS, 500, SIZE), generator=torch.Generator().manual_seed(3))
    amax = torch.tensor(0.0371)
    key = (codes + 0.5) * (amax / how.steps)
    found = attend(how, heads_of(HEADS, 500, 0), key, key, amax, amax)
    rounded = fake_quantize_heads(key, how, amax, of_keys=True)
    assert torch.equal(found.keys * (amax / how.steps), rounded)
    naive = torch.round(key / (amax / how.steps)).clamp(-how.steps, how.steps - 1)
    assert how.bits == 4 or not torch.equal(found.keys, naive)  # half steps tell a product from a division


def test_a_scale_goes_into_the_largest_magnitude_a_power_of_two_of_times():
    assert [parse_format(name, "keys").steps for name in ("int8-tensor", "int8-tensor-ort")] == [127, 128]
    assert math.log2(parse_format("int4-channel-ort", "values").steps) == 3


TOKENS = tuple(torch.randint(2, 250, (60,), generator=torch.Generator().manual_seed(5)).tolist())
REQUEST = Request(TOKENS, tuple(range(60)))


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(shared_home()))


def with_caches(model, name):
    """A variant of INT4 weights with keys and values of a format, calibrated on half of the text."""
    scheme = scheme_of({"keys": name, "values": name})
    run = partial(run_samples, loaded(model).model, [TOKENS[:30]], lambda done: None)
    ranges = collect_ranges(loaded(model).model, [], scheme, run)
    return replace(made(model, "rtn:g32"), scheme=scheme, ranges=ranges)


def kl_from_torch(model, variant, session):
    """The mean KL of a session from torch with the same scheme, in nats."""
    with torch_backend(model).open(variant) as ours, torch.inference_mode():
        states = ours.states([REQUEST])[0], session.states([REQUEST])[0]
        return float(near_kl(ours.logits, states[0], session.logits, states[1]).mean())


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_folder_answers_as_torch_does_with_the_same_scheme(name, home, tmp_path):
    variant, out = with_caches("llama", name), tmp_path / "out"
    exporter("llama").write(variant, Style(), out)
    session = ort_session(out)
    assert kl_from_torch("llama", variant, session) < 1e-6
    assert kl_from_torch("llama", variant.weights_alone, session) > 1e-6
    span = "tensor" if "tensor" in name else "channel"
    said = f"2 layers keep keys and values as integers: {name[3]} bits, a scale a {span}."
    assert said in inspect_folder(out, needs_tokenizer=False).describe()

    with pytest.raises(UsageError, match="feeds floats alone"):
        read_served(inspect_folder(out, needs_tokenizer=False))

    # a shared prefix is kept as integers too
    assert session.sharing == "one"
    prefix = session.prefill(TOKENS[:20])
    rest = Request(TOKENS[20:], tuple(range(40)))
    continued = session.states([rest, rest], prefix)[1]
    assert torch.allclose(continued, session.states([REQUEST])[0][20:], atol=1e-4)


@pytest.mark.parametrize("name", FORMATS[:3:2])
def test_the_runtime_generates_from_the_folder(name, home, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    variant, out = with_caches("llama", name), tmp_path / "out"
    exporter("llama").write(variant, Style(), out)
    assert json.loads((out / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is False
    model = og.Model(str(out))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=40, min_length=40, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([TOKENS[:30]], np.int32))
    session = ort_session(out)
    for _ in range(5):
        so_far = tuple(int(token) for token in generator.get_sequence(0))
        expected = session.logits(session.states([Request(so_far, (len(so_far) - 1,))])[0])[0]
        assert np.abs(generator.get_logits().flatten()[: len(expected)] - expected.numpy()).max() < 1e-3
        generator.generate_next_token()


def test_the_backend_opens_such_a_variant_and_says_how_it_is_run(home):
    variant = with_caches("llama", "int4-channel-ort")
    backend = OrtBackend(exporter("llama"), Style(), choose_provider("cpu"), 1)
    with backend.open(variant) as session:
        assert kl_from_torch("llama", variant, session) < 1e-6
        record = backend.describe(session, variant)
    assert record.shares_prefixes == "one"
    assert any("keep keys and values as integers" in fact for fact in record.facts)


def test_heads_that_were_zero_on_all_of_the_text_stay_zero(home, tmp_path):
    variant = with_caches("llama", "int8-channel-ort")
    zero = {name: amax * (torch.arange(amax.shape[-1]) % 2) for name, amax in variant.ranges.items()}
    variant = replace(variant, ranges=zero)
    exporter("llama").write(variant, Style(), tmp_path / "out")
    assert kl_from_torch("llama", variant, ort_session(tmp_path / "out")) < 1e-6


def test_a_graph_of_other_attention_is_refused(home, tmp_path):
    with pytest.raises(QevalError, match="GroupQueryAttention in 0 layers of 2"):
        quantize_caches(product_graph(torch.eye(4)), with_caches("llama", FORMATS[0]), tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"keys": "int8-tensor-ort"}, "one format"),
        (
            {"keys": "int8-tensor-ort", "values": "int8-channel-ort"},
            "not keys int8-tensor-ort, values int8-channel-ort",
        ),
        ({"keys": "int8-tensor", "values": "int8-tensor"}, "say for example"),
        ({"keys": "int8-tensor-ort-hadamard", "values": "int8-tensor-ort-hadamard"}, "one format"),
    ],
)
def test_what_the_operator_lacks_is_refused(names, says):
    with pytest.raises(UsageError, match=says):
        cache_format(scheme_of(names))


def test_other_providers_are_refused():
    both = scheme_of(dict.fromkeys(("keys", "values"), FORMATS[0]))
    with pytest.raises(UsageError, match="--ep cpu"):
        cache_format(both, "cuda")
    assert cache_format(Scheme(), "cuda") is None
