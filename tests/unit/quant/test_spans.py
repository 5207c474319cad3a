"""Symmetric integers by the range that they span, against the quantizers that the conventions are taken from."""

import numpy as np
import pytest
import torch

from qeval.quant.grid import parse, with_span
from qeval.quant.rtn import quantize_rtn


def matrix(rows=24, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("span", "codes", "scale"),
    [
        ("full", [7, -7, 4, 0, 0], 1.0),  # 7 / 7; 3.5 and 0.5 go to the even ones
        ("half", [7, -7, 4, 1, -1], 7 / 7.5),  # 7.5 rounds to 8 and saturates
        ("signed", [-8, 7, -4, -1, 1], -7 / 8),  # the largest goes to -8; what is as large of the other sign saturates
    ],
)
def test_a_row_by_hand(span, codes, scale):
    weight = torch.tensor([[7.0, -6.9999, 3.5, 0.5, -0.5]])
    found = quantize_rtn(weight, parse(f"int4-channel-{span}"))
    assert (found.codes.int() - 8).tolist() == [codes]
    assert float(found.scales) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(("bits", "span", "steps"), [(8, "full", 127), (8, "half", 127.5), (8, "signed", 128)])
def test_eight_bits_have_the_same_conventions(bits, span, steps):
    found = quantize_rtn(matrix(), parse(f"int{bits}-g32-{span}"))
    amax = matrix().reshape(24, 6, 32).abs().amax(-1)
    assert torch.allclose(found.scales.abs(), amax / steps, rtol=1e-6)


@pytest.mark.parametrize(
    ("plain", "whole"),
    [
        ("int4-g32", "int4-g32-signed"),
        ("int3-channel", "int3-channel-signed"),
        ("int7-g8", "int7-g8-signed"),
        ("int8-channel", "int8-channel"),
        ("int4-g32-full", "int4-g32-full"),
        ("int4-g32-half", "int4-g32-half"),
        ("int4-g32-asym", "int4-g32-asym"),
        ("nvfp4", "nvfp4"),
    ],
)
def test_a_name_without_a_range_means_the_default_of_its_bits(plain, whole):
    assert str(with_span(parse(plain))) == whole
    unsaid, said = (quantize_rtn(matrix(), parse(name)) for name in (plain, whole))
    assert torch.equal(unsaid.codes, said.codes)
    assert torch.equal(unsaid.scales, said.scales)


def test_a_stored_name_without_a_range_is_read_as_it_was_written():
    """Of manifests from before the default changed, and of matrices that others quantized."""
    grid = parse("int4-g128")
    assert (grid.span, str(grid)) == (None, "int4-g128")


def test_eight_bits_are_full_by_default():
    plain, full = (quantize_rtn(matrix(), parse(name)) for name in ("int8-channel", "int8-channel-full"))
    assert torch.equal(plain.codes, full.codes)
    assert torch.equal(plain.scales, full.scales)


@pytest.mark.parametrize("place", ["g32", "g128", "channel"])
@pytest.mark.parametrize("bits", range(2, 8))
def test_the_default_range_has_the_least_error_of_the_three(bits, place):
    for weight in (matrix(64, 512), matrix(64, 512) ** 3):  # the cubes have a few that are far from the rest
        errors = {
            span: float((quantize_rtn(weight, parse(f"int{bits}-{place}{span}")).dequantize() - weight).square().sum())
            for span in ("", "-full", "-half")
        }
        assert errors[""] < min(errors["-full"], errors["-half"])


def test_clipping_keeps_the_sign_of_the_largest():
    weight, grid = matrix(), parse("int4-g32-signed")
    whole, clipped = quantize_rtn(weight, grid), quantize_rtn(weight, grid, torch.full((24, 6), 0.75))
    assert torch.allclose(clipped.scales, whole.scales * 0.75)


@pytest.mark.parametrize("size", [32, 64])
def test_signed_is_the_default_quantizer_of_onnxruntime(size):
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    rows, columns = 24, 192
    packed = np.zeros((rows, columns // size, size // 2), np.uint8)
    scales, zeros = np.zeros(rows * columns // size, np.float32), np.zeros((rows, columns // size), np.uint8)
    weight = matrix(rows, columns)
    state.quantize_matmul_4bits(
        packed, np.ascontiguousarray(weight.T.numpy()), scales, zeros, size, rows, columns, True
    )
    found = quantize_rtn(weight, parse(f"int4-g{size}-signed"))
    assert np.array_equal(found.codes.numpy(), np.stack([packed & 15, packed >> 4], -1).reshape(rows, columns))
    np.testing.assert_array_equal(found.scales.numpy().ravel(), scales)


def test_signed_is_ggmls_q4_0_but_for_its_scales_type():
    """The reference quantizer of the gguf package: the scale is fp16 there, so codes differ where one is near a tie."""
    gguf = pytest.importorskip("gguf")
    weight = matrix()
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(24, 6, 18)
    scales = data[..., :2].copy().view(np.float16)[..., 0]
    codes = np.concatenate([data[..., 2:] & 15, data[..., 2:] >> 4], axis=-1).reshape(24, 192)
    found = quantize_rtn(weight, parse("int4-g32-signed"))
    np.testing.assert_array_equal(found.scales.numpy().astype(np.float16), scales)
    assert np.mean(found.codes.numpy() == codes) > 0.999


def test_half_is_the_rtn_of_onnxruntimes_model_builder():
    weight_only = pytest.importorskip("onnxruntime.quantization.neural_compressor.weight_only")
    weight = matrix()
    codes, scales, _ = weight_only.quant_tensor(weight.reshape(-1, 32).numpy(), 4, 32, "sym", "uint")
    found = quantize_rtn(weight, parse("int4-g32-half"))
    np.testing.assert_allclose(found.scales.numpy().ravel(), scales.ravel(), rtol=1e-6)
    # the largest of a block lies halfway between -8 and -7, where the last bit of its quotient decides
    blocks = weight.reshape(-1, 32).numpy()
    is_largest = np.abs(blocks) == np.abs(blocks).max(-1, keepdims=True)
    same = found.codes.numpy().reshape(-1, 32) == codes
    assert same[~is_largest].all()
    assert same[is_largest & (blocks > 0)].all()
