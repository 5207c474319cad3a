"""Keys and values on GroupQueryAttention's integers: the kernel beside torch."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx_ir as ir

from qeval.quant.fake_quant import fake_quantize_heads
from qeval.quant.floats import largest_magnitude
from qeval.quant.scheme import parse_format
from tests.fixtures.onnx import graph_of, session_of, value

HEADS, GROUPS, SIZE = 4, 2, 32
FORMATS = ("int8-tensor-ort", "int8-channel-ort", "int4-tensor-ort", "int4-channel-ort")


class Outputs(NamedTuple):
    """What one node of attention returns: [1, tokens, width], and the codes of keys and values."""

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
