"""Every format's reader against the other tool's own code, where it installs."""

import json

import pytest
import torch

from qeval.formats.base import Module
from qeval.formats.compressed import _decode as decode_compressed
from qeval.formats.modelopt import _decode as decode_modelopt
from qeval.formats.registry import CHECKPOINT_FORMATS
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from tests.fixtures.formats import MODELOPT, compressed, same
from tests.fixtures.tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(intermediate_size=128)


def test_model_optimizers_own_packing_is_read(model):
    export = pytest.importorskip("modelopt.torch.export.quant_utils")
    fp4 = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    weight = model.model.layers[0].mlp.up_proj.weight
    rounded = quantize_rtn(weight, parse("int4-g16"))
    parts = {"weight": export.pack_int4_in_uint8(weight, rounded.scales, 16), "weight_scale": rounded.scales}
    same(decode_modelopt(Module("m", 128, 64, parts), MODELOPT | {"group_size": 16}), rounded)
    made, scales, second = fp4.quantize(weight.clone(), 16)
    parts = {"weight": made._quantized_data, "weight_scale": scales, "weight_scale_2": second}
    values = decode_modelopt(Module("m", 128, 64, parts), MODELOPT).values
    assert torch.equal(values, made.dequantize(torch.float32, scale=scales, double_scale=second, block_sizes={-1: 16}))


def test_compressed_tensors_own_packing_is_read(model):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (3, 4, 8):
        weight = quantize_rtn(model.model.layers[0].mlp.up_proj.weight, parse(f"int{bits}-g16-asym"))
        middle = 1 << (bits - 1)
        signed, zeros = ((each.to(torch.int16) - middle).to(torch.int8) for each in (weight.codes, weight.zeros))
        parts = {
            "weight_packed": helpers.pack_to_int32(signed, bits),
            "weight_zero_point": helpers.pack_to_int32(zeros, bits, packed_dim=0),
            "weight_scale": weight.scales,
        }
        same(decode_compressed(Module("m", 128, 64, parts), compressed(bits, size=16)), weight)


def test_bitsandbytes_own_dequantization_agrees(model):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = model.model.layers[0].mlp.up_proj.weight
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            parts = {"weight": packed} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
            found = CHECKPOINT_FORMATS["bitsandbytes"].decode(Module("m", 128, 64, parts), {})
            assert torch.allclose(found.values, functional.dequantize_4bit(packed, state), atol=1e-6), (kind, nested)


def test_hqqs_own_dequantization_agrees(model):
    hqq = pytest.importorskip("hqq.core.quantize")
    weight = model.model.layers[0].mlp.up_proj.weight
    for bits in (2, 3, 4, 8):
        linear = torch.nn.Linear(64, 128, bias=False)
        linear.weight.data = weight.clone()
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
        made = hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        made.encoded_state_dict = True
        parts = {name: part for name, part in made.state_dict().items() if name != "bias"}
        found = CHECKPOINT_FORMATS["hqq"].decode(Module("m", 128, 64, parts), {})
        assert torch.allclose(found.values, made.dequantize(), atol=1e-6), bits


def test_torchaos_own_values_are_read(model):
    pytest.importorskip("torchao")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from qeval.formats.torchao import HEADER

    linear = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False))
    linear[0].weight.data = model.model.layers[0].mlp.up_proj.weight.clone()
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    tensors, header = flatten_tensor_state_dict({"0.weight": linear[0].weight})
    parts = {name.removeprefix("0."): tensor for name, tensor in tensors.items()}
    found = CHECKPOINT_FORMATS["torchao"].decode(Module("0", 128, 64, parts), {HEADER: header})
    assert torch.equal(found.values, linear[0].weight.dequantize().float())
    assert json.loads(header["tensor_names"]) == ["0.weight"]
