"""Every format's reader against checkpoints packed by hand, and against the other tool's own code where it installs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import fbgemm_fp8
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qeval.calibrate.build import build, source_of
from qeval.calibrate.stream import collect
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.formats.assemble import Reading, assemble, unused
from qeval.formats.base import Module, Values
from qeval.formats.beside import Baseline
from qeval.formats.checkpoint import opened, read_config
from qeval.formats.compressed import decode as decode_compressed
from qeval.formats.fp8 import decode as decode_fp8
from qeval.formats.fp8 import decode_rows
from qeval.formats.gptq import decode as decode_gptq
from qeval.formats.hqq import decode as decode_hqq
from qeval.formats.join import joined
from qeval.formats.modelopt import decode as decode_modelopt
from qeval.formats.registry import FORMATS, format_of
from qeval.formats.resemble import values_of
from qeval.models.families import tiny_family
from qeval.models.graph import describe
from qeval.models.head import head_of
from qeval.models.matrices import weights_of
from qeval.quant.grid import parse
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize
from qeval.store.variants import Origin, load_variant, save_variant
from tests.fixtures import packers
from tests.fixtures.tiny import save_tiny, tiny_llama

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
}


def compressed(bits, form="pack-quantized", size=None):
    weights = {"num_bits": bits, "group_size": size}
    return CT | {"format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def packed_v2(weight):
    return packers.gptq(weight, v1=False)


CASES = {
    "awq": (AWQ, packers.awq, "int4-g16-asym"),
    "awq without zero points": (AWQ, packers.awq, "int4-g16"),
    "gptq": (GPTQ, packers.gptq, "int4-g16"),
    "gptq with zero points": (GPTQ, packers.gptq, "int4-g16-asym"),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, packed_v2, "int4-g16-asym"),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, packers.gptq, "int8-g16"),
    "gptq of 2 bits": (GPTQ | {"bits": 2}, packers.gptq, "int2-g16-asym"),
    "gptq per channel": (GPTQ | {"group_size": -1}, packers.gptq, "int4-channel-asym"),
    "autoround, its default": ({"quant_method": "auto-round", "group_size": 16}, packers.gptq, "int4-g16-asym"),
    "autoround as gptqmodel": (
        {"quant_method": "auto-round", "group_size": 16, "packing_format": "auto_round:gptqmodel"},
        packed_v2,
        "int4-g16-asym",
    ),
    "autoround as awq": (
        {"quant_method": "auto-round", "group_size": 16, "packing_format": "auto_round:auto_awq"},
        packers.awq,
        "int4-g16",
    ),
    "compressed": (CT, packers.compressed, "int4-g16"),
    "compressed with zero points": (CT, packers.compressed, "int4-g16-asym"),
    "compressed, a short last group": (compressed(4, size=48), packers.compressed, "int4-g48"),
    "compressed, 8 bits per channel": (compressed(8), packers.compressed, "int8-channel"),
    "compressed, 3 bits": (compressed(3, size=16), packers.compressed, "int3-g16"),
    "compressed, bytes": (compressed(8, "int-quantized"), packers.int_quantized, "int8-channel"),
    "model optimizer": (MODELOPT | {"group_size": 16}, packers.modelopt, "int4-g16"),
    "model optimizer, bytes": (MODELOPT | {"quant_algo": "W8A16"}, packers.int_quantized, "int8-channel"),
    "llm.int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, packers.llm_int8, "int8-channel"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), dtype=torch.float32, intermediate_size=128)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(intermediate_size=128)


@pytest.fixture(scope="module")
def baseline(model):
    return Baseline(dict(model.named_parameters()), describe(model), 16, "model.")


def read(folder, baseline):
    config = read_config(folder)["quantization_config"]
    found = format_of(config, "here")
    found.notes(config)
    with opened(folder) as tensors:
        return assemble(tensors, Reading(found, config, {}), baseline, "key", lambda count: None)


def same(read, weight):
    assert str(read.grid) == str(weight.grid)
    assert torch.equal(read.codes, weight.codes)
    assert torch.allclose(read.scales, weight.scales, rtol=1e-6)
    assert (read.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or torch.equal(read.zeros, weight.zeros)


@pytest.mark.parametrize("config,pack,grid", CASES.values(), ids=CASES)
def test_integers_are_read_as_they_were_packed(base, baseline, tmp_path, config, pack, grid):
    weights = packers.quantized(base, grid)
    folder = packers.save_checkpoint(base, tmp_path, config, {name: pack(weight) for name, weight in weights.items()})
    variant = read(folder, baseline)
    assert set(variant.weights) == set(weights)
    assert not variant.floats and not variant.stored
    for name, weight in weights.items():
        same(variant.weights[name], weight)
    assert {kept.name for kept in variant.kept} == set(baseline.parameters) - set(weights)


def test_columns_in_the_order_of_activations_become_values(model):
    weight = quantize(model.model.layers[0].mlp.up_proj.weight, parse("int4-g16-asym"))
    order = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))] // 16
    found = decode_gptq(Module("m", 128, 64, packers.gptq(weight, g_idx=order)), GPTQ)
    assert isinstance(found, Values)
    for row, column in ((0, 0), (3, 17), (100, 63)):
        group = int(order[column])
        code, zero = int(weight.codes[row, column]), int(weight.zeros[row, group])
        assert float(found.values[row, column]) == pytest.approx((code - zero) * float(weight.scales[row, group]))


def test_zero_points_of_zero_survive_the_borrow_of_gptqmodel(model):
    """GPTQModel subtracts 0x11111111 from whole words: a zero point of 0 borrows from the next."""
    weight = quantize(model.model.layers[0].mlp.up_proj.weight.abs(), parse("int4-g16-asym"))
    assert not weight.zeros.any()
    same(decode_gptq(Module("m", 128, 64, packers.gptq(weight)), GPTQ), weight)


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
    with opened(path) as tensors:
        assert not unused(tensors, baseline)
    with pytest.raises(UsageError, match="holds weight_scale of shape"):
        decode_rows(Module("m", 128, 64, parts | {"weight_scale": torch.ones(128, 2)}), config)
    with pytest.raises(UsageError, match="has scales beside a weight in float32"):
        decode_rows(Module("m", 128, 64, parts | {"weight": weight}), config)


def test_fp4_experts_of_an_fp8_checkpoint_are_transformers_values():
    packed = torch.arange(-64, 64).repeat(32).reshape(128, 32).to(torch.int8)
    scales = torch.arange(120, 130).repeat(26)[: 128 * 2].reshape(128, 2).to(torch.uint8)
    for stored in (scales, scales.view(torch.float8_e8m0fnu)):
        parts = {"weight": packed, "weight_scale_inv": stored}
        found = decode_fp8(Module("m", 128, 64, parts), FP8)
        assert torch.equal(found.values, Fp8Dequantize(None)._dequantize_one(packed, stored, torch.float32))
    assert (found.form, found.size_bits) == ("fp4", 128 * 64 * 4 + 128 * 2 * 8)


def test_inputs_that_are_scaled_while_running_are_kept_beside_the_integers(base, baseline, tmp_path):
    """AWQ of a linear whose scales nothing before it takes: columns divided, inputs multiplied."""
    name = "model.layers.0.self_attn.o_proj.weight"
    scales = torch.exp2(torch.arange(64) % 7 - 3.0)
    weight = quantize(baseline.parameters[name] / scales, parse("int4-g16"))
    folder = packers.save_checkpoint(
        base, tmp_path, MODELOPT, {name: packers.modelopt(weight) | {"pre_quant_scale": scales}}
    )
    variant = read(folder, baseline)
    same(variant.weights[name], weight)
    assert torch.equal(variant.input_scales[name], scales)
    parts = {name: packers.modelopt(weight)}
    with pytest.raises(UsageError, match=f"its {name} is not the baseline's"):
        read(packers.save_checkpoint(base, tmp_path / "without", MODELOPT, parts), baseline)
    wrong = {name: packers.modelopt(weight) | {"pre_quant_scale": scales.neg()}}
    with pytest.raises(UsageError, match="pre_quant_scale is no positive number for each of the linear's 64 inputs"):
        read(packers.save_checkpoint(base, tmp_path / "wrong", MODELOPT, wrong), baseline)


def test_what_model_optimizer_rounds_beside_the_weights_is_told():
    config = MODELOPT | {"quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    algorithm, activations, cache = format_of(config, "here").notes(config)
    assert (algorithm, activations) == (
        "NVFP4",
        "its own kernels round activations too: only the loss of its weights is scored",
    )
    assert cache == "its own kernels round the cache of keys and values: not scored either"
    layers = {"a": {"quant_algo": "W4A16_AWQ"}, "b": {"quant_algo": "W8A16"}}
    config = MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert format_of(config, "here").notes(config) == ("W4A16_AWQ, W8A16",)


def test_model_optimizers_own_packing_is_read(model):
    export = pytest.importorskip("modelopt.torch.export.quant_utils")
    fp4 = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    weight = model.model.layers[0].mlp.up_proj.weight
    rounded = quantize(weight, parse("int4-g16"))
    parts = {"weight": export.pack_int4_in_uint8(weight, rounded.scales, 16), "weight_scale": rounded.scales}
    same(decode_modelopt(Module("m", 128, 64, parts), MODELOPT | {"group_size": 16}), rounded)
    made, scales, second = fp4.quantize(weight.clone(), 16)
    parts = {"weight": made._quantized_data, "weight_scale": scales, "weight_scale_2": second}
    values = decode_modelopt(Module("m", 128, 64, parts), MODELOPT).values
    assert torch.equal(values, made.dequantize(torch.float32, scale=scales, double_scale=second, block_sizes={-1: 16}))


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


def test_awqs_own_search_is_excused_wherever_it_folds(tmp_path):
    """qeval's AWQ for the tool's: scales in norms, in v_proj's rows for o_proj, in up_proj's for down_proj."""
    folder = save_tiny(tmp_path / "base", dtype=torch.float32, intermediate_size=128, num_key_value_heads=4)
    model = tiny_llama(intermediate_size=128, num_key_value_heads=4)
    samples = [torch.arange(start, start + 48).mul(37).remainder(256).tolist() for start in range(4)]
    about = describe(model)
    statistics = collect(model, about, samples, 0, lambda count: None)
    source = source_of(model, about, head_of(model), samples, statistics)
    made = build(source, parse_method("awq:int4-g16-asym"), "key", lambda done: None)
    assert not made.input_scales and len(made.floats) >= 4
    parts = {name: packers.awq(weight) for name, weight in made.weights.items()}
    path = packers.save_checkpoint(folder, tmp_path / "awq", AWQ, parts, made.floats)
    variant = read(path, Baseline(dict(model.named_parameters()), about, 16, "model."))
    for name, weight in made.weights.items():
        same(variant.weights[name], weight)
    assert {name: tensor.tolist() for name, tensor in variant.floats.items()} == {
        name: tensor.tolist() for name, tensor in made.floats.items()
    }


def test_parts_that_do_not_fit_each_other_are_named(base, baseline, tmp_path):
    weights = packers.quantized(base, "int4-g16")
    parts = {name: packers.gptq(weight) for name, weight in weights.items()}
    name = "model.layers.0.mlp.up_proj"
    parts[f"{name}.weight"]["g_idx"] = torch.arange(64) // 16 + 7
    with pytest.raises(UsageError, match=f"{name} has a g_idx that names groups which are not there"):
        read(packers.save_checkpoint(base, tmp_path, GPTQ, parts), baseline)


REFUSED = {
    "an unknown tool": ({"quant_method": "aqlm"}, "quantized by 'aqlm', which is not read"),
    "AWQ's other layout": (AWQ | {"version": "gemv"}, "not 4 bits in 'gemv'; save it as gemm"),
    "a checkpoint format": (GPTQ | {"checkpoint_format": "marlin"}, "'marlin' is not read; save it as gptq or gptq_v2"),
    "a packing of AutoRound": (
        {"quant_method": "auto-round", "packing_format": "auto_round:itrex"},
        "Unknown AutoRound packing 'auto_round:itrex'",
    ),
    "an algorithm of Model Optimizer": (
        MODELOPT | {"quant_algo": "NVFP4_SVD"},
        "Model Optimizer's 'NVFP4_SVD' is not read",
    ),
    "sparse weights": (CT | {"format": "marlin-24"}, "'marlin-24' is not read"),
    "rotations": (CT | {"transform_config": {"config_groups": {"a": {}}}}, "rotates activations while running"),
}


@pytest.mark.parametrize("config,sentence", REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_named(config, sentence):
    with pytest.raises(UsageError) as told:
        format_of(config, "here").notes(config)
    assert sentence in str(told.value)


def test_a_missing_library_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("qeval.formats.registry.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"torchao, which is not installed: pip install 'qeval\[torchao\]'"):
        format_of({"quant_method": "torchao"}, "here")


def test_every_format_has_a_title_and_markers():
    for name, found in FORMATS.items():
        assert found.title and found.markers, name


def test_a_module_of_another_shape_is_named(model):
    weight = quantize(model.model.layers[0].mlp.up_proj.weight, parse("int4-g16"))
    parts = packers.gptq(weight)
    with pytest.raises(UsageError, match="m holds qweight of"):
        decode_gptq(Module("m", 128, 128, {**parts, "qweight": parts["qweight"][:7]}), GPTQ)
    with pytest.raises(UsageError, match="m has no scales beside"):
        decode_gptq(Module("m", 128, 64, {name: part for name, part in parts.items() if name != "scales"}), GPTQ)


def test_compressed_tensors_own_packing_is_read(model):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (3, 4, 8):
        weight = quantize(model.model.layers[0].mlp.up_proj.weight, parse(f"int{bits}-g16-asym"))
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
            found = FORMATS["bitsandbytes"].decode(Module("m", 128, 64, parts), {})
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
        found = FORMATS["hqq"].decode(Module("m", 128, 64, parts), {})
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
    found = FORMATS["torchao"].decode(Module("0", 128, 64, parts), {HEADER: header})
    assert torch.equal(found.values, linear[0].weight.dequantize().float())
    assert json.loads(header["tensor_names"]) == ["0.weight"]


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


EXPERTS = {
    "Mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "Qwen3Moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Tiny mixtures of experts: saved as files name them, and as the model that transformers makes of that."""
    found = {}
    for family in EXPERTS:
        model = tiny_family(family, num_hidden_layers=1)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        found[family] = folder, Baseline(weights_of(model), describe(model), 16, "model.")
    return found


def tiles(weight):
    """The matrix in FP8, a scale for each tile of 32 x 32."""
    values = weight.dequantize()
    scales = torch.full((-(-len(values) // 32), -(-values.shape[1] // 32)), float(values.abs().max()) / 448)
    return {"weight": (values / scales[0, 0]).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


PACKED_EXPERTS = [
    ("Mixtral", AWQ, packers.awq, "int4-g16"),
    ("Mixtral", CT, packers.compressed, "int4-g16"),
    ("Qwen3Moe", GPTQ, packers.gptq, "int4-g16-asym"),
    ("Qwen3Moe", MODELOPT | {"group_size": 16}, packers.modelopt, "int4-g16"),
    ("Qwen3Moe", FP8 | {"weight_block_size": [32, 32]}, tiles, "int8-g16"),
]


@pytest.mark.parametrize("family,config,pack,grid", PACKED_EXPERTS)
def test_experts_that_lie_one_by_one_are_the_models_stack(mixtures, tmp_path, family, config, pack, grid):
    """Gate and up, apart in the file, are the upper and lower rows of one matrix; what stays in float is found too."""
    folder, baseline = mixtures[family]
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if ".experts." in name or "_proj.weight" in name]
    weights = {name: quantize(tensors[name].float(), parse(grid)) for name in names}
    parts = {name: pack(weight) for name, weight in weights.items()}
    variant = read(packers.save_checkpoint(folder, tmp_path, config, parts), baseline)
    gate, up, down = (f"model.layers.0.{name.format(2)}.weight" for name in EXPERTS[family])
    expected = {"gate_up_proj[2]": (gate, up), "down_proj[2]": (down,)}
    for name, pieces in expected.items():
        found = f"model.layers.0.mlp.experts.{name}"
        if config["quant_method"] == "fp8":
            made = torch.cat([parts[each]["weight"].float() * parts[each]["weight_scale_inv"][0, 0] for each in pieces])
            assert torch.equal(variant.floats[found], made)
        else:
            assert torch.equal(variant.weights[found].codes, torch.cat([weights[each].codes for each in pieces]))
    assert {kept.name for kept in variant.kept} == {name for name in baseline.parameters if "_proj" not in name}


def test_experts_in_float_are_found_one_by_one_and_in_a_stack(mixtures, tmp_path):
    folder, baseline = mixtures["Qwen3Moe"]
    tensors = load_file(folder / "model.safetensors")
    down = [tensors.pop(f"model.layers.0.mlp.experts.{index}.down_proj.weight") for index in range(4)]
    changed = {name: tensor * 1.01 for name, tensor in tensors.items() if "experts" in name}
    stack = "model.layers.0.mlp.experts.down_proj"
    path = packers.save_checkpoint(folder, tmp_path, None, {}, changed)
    save_file(tensors | changed | {stack: torch.stack(down) * 1.02}, path / "model.safetensors")
    with opened(path) as held:
        variant = assemble(held, Reading(None, {}, {}), baseline, "key", lambda count: None)
        assert not unused(held, baseline)
    for index in range(4):
        name = f"{stack}[{index}]"
        assert torch.equal(variant.floats[name], baseline.parameters[name] * 1.02)
        name = f"model.layers.0.mlp.experts.gate_up_proj[{index}]"
        assert torch.equal(variant.floats[name], baseline.parameters[name] * 1.01)


def test_scales_of_an_experts_inputs_are_multiplied_into_it(mixtures, tmp_path):
    folder, baseline = mixtures["Qwen3Moe"]
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    scales = torch.exp2(torch.arange(48) % 5 - 2.0)
    weight = quantize(load_file(folder / "model.safetensors")[name] / scales, parse("int4-g16"))
    parts = {name: packers.modelopt(weight) | {"pre_quant_scale": scales}}
    variant = read(packers.save_checkpoint(folder, tmp_path, MODELOPT, parts), baseline)
    assert torch.equal(variant.floats["model.layers.0.mlp.experts.down_proj[1]"], weight.dequantize() * scales)
    assert not variant.input_scales


@pytest.mark.parametrize("grids", [("int4-g16", "int4-g16-asym"), ("int8-tensor", "int8-tensor"), ("int4-g16", "int8")])
def test_joined_matrices_mean_what_they_meant_apart(model, grids):
    weight = model.model.layers[0].mlp.up_proj.weight
    parts = [quantize(weight[rows], parse(grid)) for rows, grid in zip((slice(40), slice(40, 128)), grids, strict=True)]
    read = joined(parts)
    assert torch.equal(values_of(read), torch.cat([part.dequantize() for part in parts]))
    assert isinstance(read, Values) == (grids[1] == "int8")
