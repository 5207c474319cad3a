"""Formats whose codes stay integers, against checkpoints packed by hand; and what no reader takes."""

import pytest
import torch

from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.formats.base import Module, Values
from qeval.formats.gptq import _decode as decode_gptq
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.registry import CHECKPOINT_FORMATS, format_of
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.statistics import collect
from tests.fixtures import packers
from tests.fixtures.formats import AWQ, CT, GPTQ, MODELOPT, compressed, read, same
from tests.fixtures.tiny import save_tiny, tiny_llama


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
    return BaselineWeights(dict(model.named_parameters()), describe_model(model), 16, "model.")


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
    weight = quantize_rtn(model.model.layers[0].mlp.up_proj.weight, parse("int4-g16-asym"))
    order = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))] // 16
    found = decode_gptq(Module("m", 128, 64, packers.gptq(weight, g_idx=order)), GPTQ)
    assert isinstance(found, Values)
    for row, column in ((0, 0), (3, 17), (100, 63)):
        group = int(order[column])
        code, zero = int(weight.codes[row, column]), int(weight.zeros[row, group])
        assert float(found.values[row, column]) == pytest.approx((code - zero) * float(weight.scales[row, group]))


def test_zero_points_of_zero_survive_the_borrow_of_gptqmodel(model):
    """GPTQModel subtracts 0x11111111 from whole words: a zero point of 0 borrows from the next."""
    weight = quantize_rtn(model.model.layers[0].mlp.up_proj.weight.abs(), parse("int4-g16-asym"))
    assert not weight.zeros.any()
    same(decode_gptq(Module("m", 128, 64, packers.gptq(weight)), GPTQ), weight)


def test_inputs_that_are_scaled_while_running_are_kept_beside_the_integers(base, baseline, tmp_path):
    """AWQ of a linear whose scales nothing before it takes: columns divided, inputs multiplied."""
    name = "model.layers.0.self_attn.o_proj.weight"
    scales = torch.exp2(torch.arange(64) % 7 - 3.0)
    weight = quantize_rtn(baseline.parameters[name] / scales, parse("int4-g16"))
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


def test_the_algorithms_of_model_optimizer_are_told():
    config = MODELOPT | {"quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert format_of(config, "here").notes(config) == ("NVFP4",)
    layers = {"a": {"quant_algo": "W4A16_AWQ"}, "b": {"quant_algo": "W8A16"}}
    config = MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert format_of(config, "here").notes(config) == ("W4A16_AWQ, W8A16",)


def test_awqs_own_search_is_excused_wherever_it_folds(tmp_path):
    """qeval's AWQ for the tool's: scales in norms, in v_proj's rows for o_proj, in up_proj's for down_proj."""
    folder = save_tiny(tmp_path / "base", dtype=torch.float32, intermediate_size=128, num_key_value_heads=4)
    model = tiny_llama(intermediate_size=128, num_key_value_heads=4)
    samples = [torch.arange(start, start + 48).mul(37).remainder(256).tolist() for start in range(4)]
    about = describe_model(model)
    statistics = collect(model, about, samples, 0, lambda count: None)
    source = source_of(model, about, head_of(model), samples, statistics)
    made = build_variant(source, parse_method("awq:int4-g16-asym"), "key", lambda done: None)
    assert not made.input_scales and len(made.floats) >= 4
    parts = {name: packers.awq(weight) for name, weight in made.weights.items()}
    path = packers.save_checkpoint(folder, tmp_path / "awq", AWQ, parts, made.floats)
    variant = read(path, BaselineWeights(dict(model.named_parameters()), about, 16, "model."))
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
    for name, found in CHECKPOINT_FORMATS.items():
        assert found.title and found.markers, name


def test_a_module_of_another_shape_is_named(model):
    weight = quantize_rtn(model.model.layers[0].mlp.up_proj.weight, parse("int4-g16"))
    parts = packers.gptq(weight)
    with pytest.raises(UsageError, match="m holds qweight of"):
        decode_gptq(Module("m", 128, 128, {**parts, "qweight": parts["qweight"][:7]}), GPTQ)
    with pytest.raises(UsageError, match="m has no scales beside"):
        decode_gptq(Module("m", 128, 64, {name: part for name, part in parts.items() if name != "scales"}), GPTQ)
