"""Mixtures of experts, which lie one by one in files and in stacks in the model; and matrices put together."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qeval.formats.assemble import Reading, assemble, unused_tensors
from qeval.formats.base import Values
from qeval.formats.checkpoint import open_checkpoint
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.misreadings import values_of
from qeval.formats.registry import format_of
from qeval.formats.scheme import read_scheme
from qeval.formats.stack import stack_rows
from qeval.models.families import tiny_family
from qeval.models.silence_transformers import quiet
from qeval.models.structure.graph import describe_model
from qeval.models.structure.weight_views import transposed_weights, weights_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from tests.fixtures import packers
from tests.fixtures.architectures import tiny_architecture
from tests.fixtures.formats import AWQ, CT, FP8, GPTQ, MODELOPT, read
from tests.fixtures.tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(intermediate_size=128)


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
        found[family] = folder, BaselineWeights(weights_of(model), describe_model(model), 16, "model.")
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


def test_inputs_of_experts_are_rounded_as_the_configuration_says(mixtures, tmp_path):
    folder, baseline = mixtures["Qwen3Moe"]
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if "_proj.weight" in name]
    config = FP8 | {"weight_block_size": [32, 32]}
    parts = {name: tiles(quantize_rtn(tensors[name].float(), parse("int8-g16"))) for name in names}
    with open_checkpoint(packers.save_checkpoint(folder, tmp_path, config, parts)) as stored:
        found = read_scheme(stored, Reading(format_of(config, "here"), config, {}), baseline)
    assert found.scheme.names() == {"activations": "fp8-g32"}
    assert not found.input_formats
    assert not found.limits


def test_static_scales_of_experts_are_named_and_left_out(mixtures, tmp_path):
    folder, baseline = mixtures["Qwen3Moe"]
    tensors, config = load_file(folder / "model.safetensors"), MODELOPT | {"quant_algo": "FP8"}
    parts = {
        name: {
            "weight": tensors[name].to(torch.float8_e4m3fn), "weight_scale": torch.ones(()),
            "input_scale": torch.tensor(0.5),
        }
        for name in tensors if "_proj.weight" in name
    }  # fmt: skip
    with open_checkpoint(packers.save_checkpoint(folder, tmp_path, config, parts)) as stored:
        found = read_scheme(stored, Reading(format_of(config, "here"), config, {}), baseline)
    experts = [name for name in baseline.parameters if ".experts." in name]
    assert found.input_formats == dict.fromkeys(experts)
    (sentence,) = found.limits
    assert sentence.startswith(f"inputs of {len(experts)} of {len(experts) + 4} linears: experts are kept in stacks")


@pytest.mark.parametrize("family,config,pack,grid", PACKED_EXPERTS)
def test_experts_that_lie_one_by_one_are_the_models_stack(mixtures, tmp_path, family, config, pack, grid):
    """Gate and up, apart in the file, are the upper and lower rows of one matrix; what stays in float is found too."""
    folder, baseline = mixtures[family]
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if ".experts." in name or "_proj.weight" in name]
    weights = {name: quantize_rtn(tensors[name].float(), parse(grid)) for name in names}
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
    with open_checkpoint(path) as held:
        variant = assemble(held, Reading(None, {}, {}), baseline, "key", lambda count: None)
        assert not unused_tensors(held, baseline)
    for index in range(4):
        name = f"{stack}[{index}]"
        assert torch.equal(variant.floats[name], baseline.parameters[name] * 1.02)
        name = f"model.layers.0.mlp.experts.gate_up_proj[{index}]"
        assert torch.equal(variant.floats[name], baseline.parameters[name] * 1.01)


def test_a_stack_that_the_model_keeps_transposed_is_turned_for_each_expert(tmp_path):
    """As gpt-oss has them; a checkpoint may hold them in float beside attention that is quantized."""
    with quiet():
        model = tiny_architecture("GptOss", num_hidden_layers=1)
        model.save_pretrained(tmp_path / "float")
    turned = transposed_weights(model)
    baseline = BaselineWeights(weights_of(model), describe_model(model, folds=False), 16, "model.", turned)
    stack = "model.layers.0.mlp.experts.down_proj"
    changed = {stack: model.get_parameter(stack) * 1.02}
    path = packers.save_checkpoint(tmp_path / "float", tmp_path / "other", None, {}, changed)
    with open_checkpoint(path) as held:
        variant = assemble(held, Reading(None, {}, {}), baseline, "key", lambda count: None)
    for index in range(4):
        found = variant.floats[f"{stack}[{index}]"]
        assert torch.equal(found, (model.get_parameter(stack)[index] * 1.02).T)


def test_scales_of_an_experts_inputs_are_multiplied_into_it(mixtures, tmp_path):
    folder, baseline = mixtures["Qwen3Moe"]
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    scales = torch.exp2(torch.arange(48) % 5 - 2.0)
    weight = quantize_rtn(load_file(folder / "model.safetensors")[name] / scales, parse("int4-g16"))
    parts = {name: packers.modelopt(weight) | {"pre_quant_scale": scales}}
    variant = read(packers.save_checkpoint(folder, tmp_path, MODELOPT, parts), baseline)
    assert torch.equal(variant.floats["model.layers.0.mlp.experts.down_proj[1]"], weight.dequantize() * scales)
    assert not variant.input_scales


@pytest.mark.parametrize("grids", [("int4-g16", "int4-g16-asym"), ("int8-tensor", "int8-tensor"), ("int4-g16", "int8")])
def test_joined_matrices_mean_what_they_meant_apart(model, grids):
    weight = model.model.layers[0].mlp.up_proj.weight
    parts = [
        quantize_rtn(weight[rows], parse(grid)) for rows, grid in zip((slice(40), slice(40, 128)), grids, strict=True)
    ]
    read = stack_rows(parts)
    assert torch.equal(values_of(read), torch.cat([part.dequantize() for part in parts]))
    assert isinstance(read, Values) == (grids[1] == "int8")
