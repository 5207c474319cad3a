"""Activations, keys and values against plain loops, torch's float8 casts and the gguf package."""

import math

import numpy as np
import pytest
import torch

from qeval.quant.elements import E2M1
from qeval.quant.fake_quant import fake_quantize_heads, fake_quantize_rows, rotate, rotation_size
from qeval.quant.scheme import parse_format


def numbers(*shape, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[3] = 9.0  # an outlier
    return values


def int_twin(row, amax, bits):
    """One number after the other, in float32."""
    largest = 2 ** (bits - 1) - 1
    f = np.float32
    if amax == 0:
        return [0.0 for _ in row]
    inverse, scale = f(largest) / f(amax), f(amax) / f(largest)
    codes = (min(max(float(np.rint(f(value) * inverse)), -largest - 1), largest) for value in row)
    return [float(f(code) * scale) for code in codes]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_by_token_are_a_plain_loops(bits):
    values = numbers(2, 5, 12)
    values[1, 2] = 0
    found = fake_quantize_rows(values, parse_format(f"int{bits}-token", "activations"))
    for place in np.ndindex(2, 5):
        row = values[place].tolist()
        assert found[place].tolist() == int_twin(row, max(map(abs, row)), bits)


def test_integers_by_block_end_in_a_short_one():
    values = numbers(3, 21)
    found = fake_quantize_rows(values, parse_format("int8-g8", "activations"))
    for row in range(3):
        expected = []
        for start in range(0, 21, 8):
            block = values[row, start : start + 8].tolist()
            expected += int_twin(block, max(map(abs, block)), 8)
        assert found[row].tolist() == expected


def test_static_integers_saturate_at_the_calibrated_magnitude():
    values, amax = numbers(2, 4, 3, 6), torch.tensor(2.0)
    found = fake_quantize_rows(values, parse_format("int8-tensor", "keys"), amax)
    for place in np.ndindex(2, 4, 3):
        assert found[place].tolist() == int_twin(values[place].tolist(), 2.0, 8)
    assert found.max() == 2.0
    assert found.min() >= -2.0 * 128 / 127


def test_static_channels_have_scales_of_their_own():
    values = numbers(2, 4, 3, 6)
    amax = values.abs().amax(dim=(0, 2)).unsqueeze(1) * 0.9
    found = fake_quantize_rows(values, parse_format("int8-channel", "keys"), amax)
    for batch, head, token, channel in np.ndindex(2, 4, 3, 6):
        value, most = float(values[batch, head, token, channel]), float(amax[head, 0, channel])
        assert [float(found[batch, head, token, channel])] == int_twin([value], most, 8)


@pytest.mark.parametrize(
    ("words", "dtype", "largest"), [("fp8", "float8_e4m3fn", 448), ("fp8-e5m2", "float8_e5m2", 57344)]
)
def test_fp8_by_token_is_torchs_cast(words, dtype, largest):
    values = numbers(4, 7, 33)
    found = fake_quantize_rows(values, parse_format(words, "activations"))
    amax = values.abs().amax(-1, keepdim=True)
    scale = amax / torch.full_like(amax, largest)
    assert torch.equal(found, (values / scale).to(getattr(torch, dtype)).float() * scale)


def test_static_fp8_saturates():
    values, amax = numbers(4, 33), torch.tensor(1.5)
    found = fake_quantize_rows(values, parse_format("fp8-static", "activations"), amax)
    scale = amax / torch.full_like(amax, 448.0)
    assert torch.equal(found, (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)


def test_groups_of_128_are_rounded_alone():
    values = numbers(3, 300)
    found = fake_quantize_rows(values, parse_format("fp8-g128", "activations"))
    for start in (0, 128, 256):
        part = slice(start, start + 128)
        assert torch.equal(found[:, part], fake_quantize_rows(values[:, part], parse_format("fp8", "activations")))


def nearest_e2m1(value):
    """The nearest of FP4's magnitudes, ties to the even code."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    code = min(range(8), key=lambda code: (abs(magnitudes[code] - abs(value)), code % 2))
    return math.copysign(magnitudes[code], value)


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_mxfp4_is_a_plain_loops(rule):
    values = numbers(2, 64)
    found = fake_quantize_rows(values, parse_format(f"mxfp4-{rule}", "activations"))
    for row in range(2):
        for start in (0, 32):
            block = values[row, start : start + 32].tolist()
            amax = max(map(abs, block))
            exponent = math.floor(math.log2(amax)) - 2 if rule == "floor" else math.ceil(math.log2(amax / 6))
            expected = [nearest_e2m1(value / 2.0**exponent) * 2.0**exponent for value in block]
            assert found[row, start : start + 32].tolist() == expected


def test_nvfp4_stands_on_a_static_scale_of_the_whole():
    values, amax = numbers(2, 32), torch.tensor(12.0)
    found = fake_quantize_rows(values, parse_format("nvfp4", "activations"), amax)
    whole = np.float32(12.0) / np.float32(6 * 448)
    for row in range(2):
        for start in (0, 16):
            block = values[row, start : start + 16]
            share = torch.tensor(np.float32(block.abs().max()) / (whole * np.float32(6)))
            scale = float(share.to(torch.float8_e4m3fn).float() * torch.tensor(whole))
            expected = torch.tensor([nearest_e2m1(float(v) / scale) * scale for v in block])
            assert torch.allclose(found[row, start : start + 16], expected, rtol=1e-6, atol=0)
    assert E2M1.bits == 4


@pytest.mark.parametrize(("name", "largest"), [("mxfp6", 7.5), ("mxfp6-e3m2", 28.0)])
def test_mxfp6_is_ml_dtypes_cast(name, largest):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = numbers(5, 64) * torch.logspace(-3, 3, 5).unsqueeze(1)
    found = fake_quantize_rows(values, parse_format(name, "activations"))
    kind = ml_dtypes.float6_e3m2fn if "e3m2" in name else ml_dtypes.float6_e2m3fn
    blocks = values.numpy().reshape(5, 2, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - math.floor(math.log2(largest))
    scaled = np.clip(blocks / np.exp2(exponents), -largest, largest)  # the floor rule saturates
    expected = scaled.astype(kind).astype(np.float32) * np.exp2(exponents)
    assert np.array_equal(found.numpy().reshape(5, 2, 32), expected)


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q5_1", "q4_0", "q4_1"])
def test_ggmls_types_are_the_gguf_packages(kind):
    gguf = pytest.importorskip("gguf")
    from gguf import quants

    values = numbers(64, 96) * torch.logspace(-6, 3, 64).unsqueeze(1)
    values[5] = 0
    values[6, 4] = -values[6].abs().max()  # two extremes of one magnitude
    qtype = gguf.GGMLQuantizationType[kind.upper()]
    expected = quants.dequantize(quants.quantize(values.numpy(), qtype), qtype)
    found = fake_quantize_rows(values, parse_format(kind, "keys"))
    assert np.array_equal(found.numpy(), expected)


def iq4_nl_twin(block, table):
    """`quantize_row_iq4_nl_ref` of ggml-quants.c, one number after the other in float32: the codes and the scale."""
    f = np.float32
    extreme = max(block, key=abs)  # the first of the largest
    if abs(extreme) < 1e-15:
        return [0] * 32, f(0)
    inverse = f(1) / (extreme / f(table[0]))
    products, squares, codes = f(0), f(0), []
    for x in block:
        scaled = inverse * x
        code = min(range(16), key=lambda each: (abs(scaled - f(table[each])), -each))
        value, weight = f(table[code]), x * x
        products += weight * value * x
        squares += weight * value * value
        codes.append(code)
    return codes, products / squares


def test_iq4_nl_is_a_plain_loops_as_the_gguf_package_reads_it():
    gguf = pytest.importorskip("gguf")
    from gguf import quants

    values = numbers(32, 64) * torch.logspace(-6, 3, 32).unsqueeze(1)
    values[5] = 0
    blocks = []
    for block in values.reshape(-1, 32).numpy():
        codes, scale = iq4_nl_twin(list(block), quants.IQ4_NL.kvalues)
        packed = np.array(codes[:16], np.uint8) | np.array(codes[16:], np.uint8) << 4
        blocks.append(np.concatenate([np.array([scale], np.float16).view(np.uint8), packed]))
    expected = quants.dequantize(np.stack(blocks), gguf.GGMLQuantizationType.IQ4_NL).reshape(32, 64)
    found = fake_quantize_rows(values, parse_format("iq4_nl", "keys"))
    assert np.array_equal(found.numpy(), expected)
    assert not found[5].any()


def test_a_rotation_is_sylvesters_and_its_own_inverse():
    heads = numbers(2, 3, 4, 8)
    rows = [[(-1) ** bin(i & j).count("1") / math.sqrt(8) for j in range(8)] for i in range(8)]
    assert torch.allclose(rotate(heads, 8), heads @ torch.tensor(rows), atol=1e-6)
    assert torch.allclose(rotate(rotate(heads, 8), 8), heads, atol=1e-6)


@pytest.mark.parametrize(("head", "keys", "values"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (80, 16, 16)])
def test_a_rotation_has_llama_cpps_size(head, keys, values):
    assert (rotation_size(head, of_keys=True), rotation_size(head, of_keys=False)) == (keys, values)


def test_heads_are_rounded_inside_the_rotation():
    heads = numbers(1, 2, 5, 64)
    found = fake_quantize_heads(heads, parse_format("q4_0-hadamard", "values"), of_keys=False)
    plain = fake_quantize_rows(rotate(heads, 64), parse_format("q4_0", "values"))
    assert torch.equal(found, rotate(plain, 64))
    error = torch.linalg.vector_norm(found - heads)
    assert error < torch.linalg.vector_norm(fake_quantize_rows(heads, parse_format("q4_0", "values")) - heads)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4-g16", "mxfp8-rceil", "q8_0", "q4_0-hadamard"])
def test_a_token_does_not_depend_on_the_others(name):
    heads, how = numbers(3, 2, 7, 32), parse_format(name, "keys")
    before = heads.clone()
    found = fake_quantize_heads(heads, how, of_keys=True)
    assert torch.equal(heads, before)
    for token in range(7):
        alone = fake_quantize_heads(heads[1:2, :, token : token + 1], how, of_keys=True)
        assert torch.allclose(found[1:2, :, token : token + 1], alone, atol=1e-6)


def test_a_static_format_without_magnitudes_is_refused():
    with pytest.raises(ValueError, match="calibration"):
        fake_quantize_rows(numbers(2, 8), parse_format("fp8-static", "activations"))
