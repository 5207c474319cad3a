"""Matrices on grids of floats against plain formulas in torch, matrix by matrix, and against the libraries named."""

import pytest
import torch

from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn


def matrix(rows=200, columns=300, seed=0, dtype=torch.bfloat16):
    """In bf16, as checkpoints are: many of its weights lie halfway between two values of an element."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype).float()


@pytest.mark.parametrize("last", ["", "-div"])
def test_fp8_multiplies_as_model_optimizer_or_divides_as_compressed_tensors(last):
    weight = matrix()
    for name, amax in (("fp8-tensor", weight.abs().amax()), ("fp8-channel", weight.abs().amax(1, keepdim=True))):
        scale = amax / torch.full_like(amax, 448.0)
        expected = (weight / scale if last else (weight * (448.0 / amax)).clamp(-448, 448)).to(torch.float8_e4m3fn)
        found = quantize_rtn(weight, parse(name + last))
        assert torch.equal(found.codes, expected.view(torch.uint8))
        assert torch.equal(found.dequantize(), expected.float() * scale)


def test_the_two_ways_part_where_weights_of_bf16_lie_halfway():
    one, other = (quantize_rtn(matrix(), parse(name)) for name in ("fp8-channel", "fp8-channel-div"))
    assert torch.equal(one.scales, other.scales)
    differ = one.codes != other.codes
    assert 0 < float(differ.float().mean()) < 0.01
    assert int((one.codes.int() - other.codes.int()).abs().max()) == 1


@pytest.mark.parametrize("shape", [(200, 300), (128, 256), (5, 7), (129, 127)])
def test_fp8_by_tile_is_model_optimizers_tile_by_tile(shape):
    weight = matrix(*shape)
    found = quantize_rtn(weight, parse("fp8-tile128"))
    assert found.scales.shape == (shape[0], -(-shape[1] // 128))
    for top in range(0, shape[0], 128):
        for left in range(0, shape[1], 128):
            tile = weight[top : top + 128, left : left + 128]
            expected = (tile * (448.0 / tile.abs().amax())).clamp(-448, 448).to(torch.float8_e4m3fn)
            codes = found.codes[top : top + 128, left : left + 128]
            assert torch.equal(codes, expected.view(torch.uint8))
            assert bool((found.scales[top : top + 128, left // 128] == tile.abs().amax() / 448).all())


def nvfp4_of_model_optimizer(weight):
    """Codes and values by the arithmetic of NVFP4QTensor (modelopt/torch/quantization/qtensor/nvfp4_tensor.py)."""
    second = weight.abs().amax().float() / (6.0 * 448.0)
    blocks = weight.reshape(len(weight), -1, 16)
    scales = (blocks.abs().amax(-1) / (6.0 * second)).to(torch.float8_e4m3fn)
    scaled = blocks / (scales.float() * second).unsqueeze(-1)
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    sign, size = (scaled < 0).to(torch.uint8), scaled.abs()
    order = torch.searchsorted(bounds, size, out_int32=True).to(torch.uint8)
    # halfway between two values the one with the even code is taken: the upper one at these bounds
    order = order + (size.unsqueeze(-1) == bounds[[1, 3, 5]]).any(-1).to(torch.uint8)
    return (sign * 8 + order).reshape(weight.shape), scales


def test_nvfp4_is_model_optimizers():
    weight = matrix(64, 320)
    codes, scales = nvfp4_of_model_optimizer(weight)
    found = quantize_rtn(weight, parse("nvfp4"))
    is_zero = (codes & 7) == 0  # of which there is one of each sign
    assert torch.equal(found.codes[~is_zero], codes[~is_zero])
    assert torch.equal(found.codes & 7, codes & 7)
    assert torch.equal(found.scales, scales.float() * found.global_scale)
    assert float(found.global_scale) == float(weight.abs().amax() / 2688)


def test_nvfp4_blocks_far_below_the_largest_weight_stay_finite():
    weight = torch.full((1, 32), 1e-7)
    weight[0, 20] = 1.0
    found = quantize_rtn(weight, parse("nvfp4")).dequantize()
    assert bool(torch.isfinite(found).all())
    assert float((found - weight).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", ["mxfp4-floor", "mxfp4-even", "mxfp4-rceil", "mxfp8-rceil", "mxfp6-e3m2-floor"])
def test_microscaled_scales_are_powers_of_two(name):
    scales = quantize_rtn(matrix(), parse(name)).scales
    assert scales.shape == (200, 10)
    assert torch.equal(torch.exp2(torch.log2(scales).round()), scales)


def test_compressed_tensors_takes_the_same_scales_and_codes():
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    arguments = pytest.importorskip("compressed_tensors.quantization.quant_args")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = matrix()
    args = arguments.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    scale, zero = helpers.calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    codes = forward.quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn)
    found = quantize_rtn(weight, parse("fp8-channel-div"))
    assert torch.equal(found.codes, codes.view(torch.uint8))
    assert torch.equal(found.scales, scale.float())


@pytest.mark.parametrize(("rule", "mode"), [("floor", "FLOOR"), ("even", "EVEN"), ("rceil", "RCEIL")])
@pytest.mark.parametrize(("name", "dtype"), [("mxfp8", "float8_e4m3fn"), ("mxfp4", "float4_e2m1fn_x2")])
def test_torchao_takes_the_same_exponents_and_values(name, dtype, rule, mode):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    weight = matrix(64, 320)
    scales, codes = mx.to_mx(weight, getattr(torch, dtype), 32, getattr(config.ScaleCalculationMode, mode))
    found = quantize_rtn(weight, parse(f"{name}-{rule}"))
    assert torch.equal(found.scales, torch.exp2(scales.view(torch.uint8).float() - 127))
    packed = codes.view(torch.uint8)
    if name == "mxfp4":
        packed = torch.stack([packed & 15, packed >> 4], -1).reshape(weight.shape)
    assert torch.equal(found.codes, packed)
