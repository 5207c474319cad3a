"""Formats whose codes become values: NF4, FP8, FP4, HQQ, each from its definition."""

import pytest
import torch
from transformers.integrations import fbgemm_fp8
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qeval.errors import UsageError
from qeval.formats.assemble import unused_tensors
from qeval.formats.base import Module
from qeval.formats.checkpoint import open_checkpoint
from qeval.formats.compressed import _decode as decode_compressed
from qeval.formats.fp8 import _decode_rows
from qeval.formats.fp8 import _decode_tiles as decode_fp8
from qeval.formats.hqq import _decode as decode_hqq
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.modelopt import _decode as decode_modelopt
from qeval.models.structure.graph import describe_model
from qeval.quant.qweight import QWeight
from qeval.store.variants import Origin, load_variant, save_variant
from tests.fixtures import packers
from tests.fixtures.formats import CT, FP8, MODELOPT, read
from tests.fixtures.tiny import save_tiny, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), dtype=torch.float32, intermediate_size=128)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(intermediate_size=128)


@pytest.fixture(scope="module")
def baseline(model):
    return BaselineWeights(dict(model.named_parameters()), describe_model(model), 16, "model.")


def test_nf4_is_dequantized_by_its_own_table(base, baseline, tmp_path, model):
    name = "model.layers.0.mlp.up_proj.weight"
    parts, values = packers.nf4(model.get_parameter(name))
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    variant = read(packers.save_checkpoint(base, tmp_path, config, {name: parts}), baseline)
    assert torch.equal(variant.floats[name], values)
    (stored,) = variant.stored
    assert (stored.name, stored.form, stored.size_bits) == (name, "nf4, blocks of 64", 64 * 128 * 4 + 128 * 32)
    assert variant.bits_per_weight == 4.5


def test_fp8_and_fp4_are_values(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    scale = weight.abs().amax(1, keepdim=True) / 448
    parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    found = decode_compressed(Module("m", 128, 64, parts), CT)
    assert torch.equal(found.values, parts["weight"].float() * scale)
    assert float((found.values - weight).norm() / weight.norm()) < 0.04
    codes = torch.arange(128 * 32).reshape(128, 32).to(torch.uint8)
    scales = torch.full((128, 4), 2.0).to(torch.float8_e4m3fn)
    four = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": torch.tensor([4.0])}
    values = decode_compressed(Module("m", 128, 64, four), CT).values
    assert values[0, :4].tolist() == [0.0, 0.0, 0.25, 0.0]  # bytes 0 and 1, low nibble first; 2 / 4 a unit


def test_model_optimizers_small_floats_are_values(model):
    """Each from its definition, and the two scales of NVFP4 multiplied."""
    weight = model.model.layers[0].mlp.up_proj.weight
    tiles = weight.abs().reshape(4, 32, 2, 32).amax((1, 3), keepdim=True) / 448
    parts = {"weight": (weight.reshape(4, 32, 2, 32) / tiles).reshape(128, 64).to(torch.float8_e4m3fn)}
    found = decode_modelopt(Module("m", 128, 64, parts | {"weight_scale": tiles}), MODELOPT)
    assert torch.equal(found.values, (parts["weight"].float().reshape(4, 32, 2, 32) * tiles).reshape(128, 64))
    exponents = torch.arange(256).reshape(128, 2).to(torch.uint8)
    micro = decode_modelopt(Module("m", 128, 64, parts | {"weight_scale": exponents}), MODELOPT)
    assert float(micro.values[64, 40]) == float(parts["weight"][64, 40].float()) * 2.0 ** (129 - 127)
    four = {
        "weight": torch.arange(128 * 32).reshape(128, 32).to(torch.uint8),
        "weight_scale": torch.full((128, 4), 2.0).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
    }
    values = decode_modelopt(Module("m", 128, 64, four), MODELOPT)
    assert values.values[0, :4].tolist() == [0.0, 0.0, 0.25, 0.0]  # bytes 0 and 1, low nibble first; 2 * 0.25 a unit
    assert (values.form, values.size_bits) == ("nvfp4", 128 * 64 * 4 + 128 * 4 * 8)


@pytest.mark.parametrize("shape", [(128, 64), (192, 160), (128, 100)])
def test_fp8_tiles_are_those_of_deepseeks_own_loop(shape):
    """Block by block, the last ones short; and as transformers has it where all are whole."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand((-(-rows // 128), -(-columns // 32)), generator=generator)
    parts = {"weight": weight, "weight_scale_inv": scales}
    found = decode_fp8(Module("m", rows, columns, parts), FP8 | {"weight_block_size": [128, 32]})
    for row in range(len(scales)):
        for column in range(scales.shape[1]):
            there = slice(128 * row, 128 * (row + 1)), slice(32 * column, 32 * (column + 1))
            assert torch.equal(found.values[there], weight[there].float() * scales[row, column])
    if rows % 128 == columns % 32 == 0:
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scales)
        assert torch.equal(found.values, theirs)


def test_fp8_by_rows_is_what_transformers_own_linear_multiplies_by(model, base, baseline, tmp_path, monkeypatch):
    """Its product with the identity, by torch's kernel in place of fbgemm's; its activations are exact in FP8."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    scale = weight.abs().amax(1, keepdim=True) / 448
    parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    monkeypatch.setattr(fbgemm_fp8, "_is_torch_xpu_available", True)
    exact = lambda x, scale_ub: (x.to(torch.float8_e4m3fn), torch.ones(len(x)))  # noqa: E731
    monkeypatch.setattr(fbgemm_fp8, "quantize_fp8_per_row", exact, raising=False)
    theirs = fbgemm_fp8.FbgemmFp8Linear(64, 128, bias=False)
    theirs.load_state_dict(parts, assign=True)
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    held = {name: parts | {"input_scale_ub": torch.tensor([1200.0])}}
    path = packers.save_checkpoint(base, tmp_path, config, held)
    variant = read(path, baseline)
    assert torch.equal(variant.floats[name], theirs(torch.eye(64)).T)
    (stored,) = variant.stored
    assert (stored.form, stored.size_bits) == ("fp8 e4m3", 128 * 64 * 8 + 128 * 32)
    with open_checkpoint(path) as tensors:
        assert not unused_tensors(tensors, baseline)
    with pytest.raises(UsageError, match="holds weight_scale of shape"):
        _decode_rows(Module("m", 128, 64, parts | {"weight_scale": torch.ones(128, 2)}), config)
    with pytest.raises(UsageError, match="has scales beside a weight in float32"):
        _decode_rows(Module("m", 128, 64, parts | {"weight": weight}), config)


def test_fp4_experts_of_an_fp8_checkpoint_are_transformers_values():
    packed = torch.arange(-64, 64).repeat(32).reshape(128, 32).to(torch.int8)
    scales = torch.arange(120, 130).repeat(26)[: 128 * 2].reshape(128, 2).to(torch.uint8)
    for stored in (scales, scales.view(torch.float8_e8m0fnu)):
        parts = {"weight": packed, "weight_scale_inv": stored}
        found = decode_fp8(Module("m", 128, 64, parts), FP8)
        assert torch.equal(found.values, Fp8Dequantize(None)._dequantize_one(packed, stored, torch.float32))
    assert (found.form, found.size_bits) == ("fp4", 128 * 64 * 4 + 128 * 2 * 8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_is_read_along_either_axis(model, bits, axis):
    generator = torch.Generator().manual_seed(bits)
    shape = (128, 64) if axis == 1 else (64, 128)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    scale, zero = torch.rand((128, 1), generator=generator), torch.rand((128, 1), generator=generator) * 2**bits
    scale, zero = (scale, zero) if axis == 1 else (scale.t(), zero.t())
    count = 8 // bits
    step = len(codes) // count
    packed = sum(codes[i * step : (i + 1) * step] << bits * (count - 1 - i) for i in range(count)).to(torch.uint8)
    numbers = {"nbits": bits, "group_size": 64, "axis": axis, "view_as_float": 0}
    parts = {name: torch.tensor(value) for name, value in numbers.items()} | {
        "W_q": packed,
        "scale": scale,
        "zero": zero,
    }
    found = decode_hqq(Module("m", 128, 64, parts), {})
    assert torch.allclose(found.values, ((codes - zero) * scale).reshape(128, 64))


def test_a_variant_of_values_reads_back_from_disk(base, baseline, tmp_path, model):
    name = "model.layers.0.mlp.up_proj.weight"
    parts, _ = packers.nf4(model.get_parameter(name))
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    variant = read(packers.save_checkpoint(base, tmp_path / "in", config, {name: parts}), baseline)
    origin = Origin(recipe={"method": "bitsandbytes"}, model={}, calibration=None, float_bits=16, seconds=0.0)
    save_variant(variant, tmp_path / "out", origin)
    again = load_variant(tmp_path / "out")
    assert again.stored == variant.stored
    assert torch.equal(again.floats[name], variant.floats[name])
    assert isinstance(again.weights, dict) and not any(isinstance(each, QWeight) for each in again.floats.values())
