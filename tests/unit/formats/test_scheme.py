"""Activations, keys and values as checkpoints' configurations say them, read as qeval's formats."""

import json

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from qeval.compare.schemes import with_external_scheme
from qeval.errors import UsageError
from qeval.formats.assemble import Reading
from qeval.formats.checkpoint import open_checkpoint, read_quantization
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.registry import format_of
from qeval.formats.scheme import read_scheme
from qeval.models.structure.graph import describe_model
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.scheme import Scheme
from qeval.quant.variant import Variant
from tests.fixtures import packers
from tests.fixtures.families import LATENT, SIZES
from tests.fixtures.formats import AWQ, CT, FP8, MODELOPT
from tests.fixtures.tiny import save_tiny, tiny_llama

UP, DOWN = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), dtype=torch.float32, intermediate_size=128)


@pytest.fixture(scope="module")
def baseline():
    model = tiny_llama(intermediate_size=128)
    return BaselineWeights(dict(model.named_parameters()), describe_model(model), 16, "model.")


@pytest.fixture
def scheme(base, baseline, tmp_path):
    """Reads the scheme of the base in FP8 with a configuration and more tensors."""

    def read(config, changed=None, pack=packers.fp8, grid="fp8-channel"):
        parts = {name: pack(weight) for name, weight in packers.quantized(base, grid, halved=False).items()}
        folder = packers.save_checkpoint(base, tmp_path, config, parts, changed)
        with open_checkpoint(folder) as tensors:
            return read_scheme(tensors, Reading(format_of(config, "here"), config, {}), baseline)

    return read


def compressed_with(arguments, **more):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}, "input_activations": arguments}
    return CT | {"format": "float-quantized", "config_groups": {"group_0": group}} | more


def of_all(part, value):
    """A tensor of each linear of the decoder layers, or of each attention."""
    linears = [f"{kind}_proj" for kind in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")]
    linears += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    below = ["self_attn"] if part in ("k_scale", "v_scale") else linears
    return {f"model.layers.{layer}.{name}.{part}": torch.tensor([value]) for layer in range(2) for name in below}


WORDS = {
    "fp8 by token": (TOKEN, "fp8-token"),
    "int8 by token": ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, "int8-token"),
    "fp8 in groups": (TOKEN | {"strategy": "group", "group_size": 64}, "fp8-g64"),
    "int4 in groups": ({"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": True}, "int4-g32"),
    "mxfp8": (TOKEN | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, "mxfp8-even"),
    "mxfp4": (TOKEN | {"num_bits": 4, "strategy": "group", "group_size": 32}, "mxfp4-even"),
}


@pytest.mark.parametrize("arguments,name", WORDS.values(), ids=WORDS)
def test_dynamic_activations_of_compressed_tensors_have_formats(scheme, arguments, name):
    found = scheme(compressed_with(arguments))
    assert found.scheme.names() == {"activations": name}
    assert not found.ranges and not found.input_formats and not found.limits


ALGORITHMS = {
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-token",
    "MXFP4": "mxfp4-rceil",
    "MXFP8": "mxfp8-rceil",
}


@pytest.mark.parametrize("algorithm,name", ALGORITHMS.items())
def test_dynamic_activations_of_model_optimizer_have_formats(scheme, algorithm, name):
    assert scheme(MODELOPT | {"quant_algo": algorithm}).scheme.names() == {"activations": name}


STATIC_SCALES = {
    "compressed-tensors, fp8": (compressed_with(STATIC), "input_scale", 0.5, "fp8-tensor", 224.0),
    "compressed-tensors, int8": (compressed_with(STATIC | {"type": "int"}), "input_scale", 0.5, "int8-tensor", 63.5),
    "compressed-tensors, nvfp4": (
        compressed_with({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                         "dynamic": "local"}),
        "input_global_scale", 5376.0, "nvfp4", 0.5,
    ),
    "Model Optimizer, fp8": (MODELOPT | {"quant_algo": "FP8"}, "input_scale", 0.5, "fp8-tensor", 224.0),
    "Model Optimizer, nvfp4": (MODELOPT | {"quant_algo": "NVFP4"}, "input_scale", 0.5, "nvfp4", 1344.0),
    "Model Optimizer, int8": (
        MODELOPT | {"quant_algo": "W8A8_SQ_PER_CHANNEL"}, "input_scale", 0.5, "int8-tensor", 63.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("config,part,scale,name,amax", STATIC_SCALES.values(), ids=STATIC_SCALES)
def test_a_static_scale_is_read_as_the_largest_magnitude_that_it_stands_for(scheme, config, part, scale, name, amax):
    found = scheme(config, of_all(part, scale))
    assert found.scheme.names() == {"activations": name}
    assert found.ranges.keys() == {f"{each.removesuffix(f'.{part}')}.weight" for each in of_all(part, scale)}
    assert {float(each) for each in found.ranges.values()} == {amax}


def test_keys_and_values_have_their_scales_by_layer(scheme):
    scales = of_all("k_scale", 0.5) | of_all("v_scale", 0.25)
    found = scheme(compressed_with(TOKEN, kv_cache_scheme=STATIC), scales)
    assert found.scheme.names() == {"activations": "fp8-token", "keys": "fp8-tensor", "values": "fp8-tensor"}
    assert {name: float(amax) for name, amax in found.ranges.items()} == {
        "0.keys": 224.0, "1.keys": 224.0, "0.values": 112.0, "1.values": 112.0,
    }  # fmt: skip


def test_model_optimizers_keys_and_values_lie_below_their_projections(scheme):
    config = MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": "INT8"}
    scales = {name.replace("self_attn.", "self_attn.k_proj."): each for name, each in of_all("k_scale", 2.0).items()}
    found = scheme(config, scales)
    assert found.scheme.names() == {"activations": "fp8-token", "keys": "int8-tensor"}
    assert {name: float(amax) for name, amax in found.ranges.items()} == {"0.keys": 254.0, "1.keys": 254.0}
    assert found.limits == ("values: int8-tensor, whose v_scale the file lacks in 2 of 2 layers",)


def test_fp8_keys_without_a_scale_have_1_as_engines_do(scheme):
    found = scheme(MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": "FP8"})
    assert {float(amax) for amax in found.ranges.values()} == {448.0}
    assert found.notes[0] == "the file has no k_scale in 2 of 2 layers: 1.0 there"


def test_nvfp4_keys_and_values_have_a_second_scale(scheme):
    config = MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": "NVFP4"}
    found = scheme(config, of_all("k_scale", 0.5) | of_all("v_scale", 0.5))
    assert found.scheme.names() == {"activations": "fp8-token", "keys": "nvfp4", "values": "nvfp4"}
    assert {float(amax) for amax in found.ranges.values()} == {1344.0}


def test_tiles_of_fp8_have_activations_in_groups_as_wide(scheme):
    assert scheme(FP8, pack=packers.fp8_tiles, grid="fp8-tile128").scheme.names() == {"activations": "fp8-g128"}
    whole = {"quant_method": "fp8", "activation_scheme": "static"}
    found = scheme(whole, of_all("activation_scale", 0.5), packers.fp8_tiles, "fp8-tile128")
    assert found.scheme.names() == {"activations": "fp8-tensor"}
    assert {float(amax) for amax in found.ranges.values()} == {224.0}


def test_linears_of_two_groups_have_two_formats(scheme):
    groups = {
        "a": {"targets": [r"re:.*down_proj$"], "weights": {"num_bits": 8, "type": "float"}, "input_activations": None},
        "b": {"targets": [UP], "weights": {"num_bits": 8, "type": "float"}, "input_activations": STATIC},
        "c": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}, "input_activations": TOKEN},
    }
    found = scheme(CT | {"format": "float-quantized", "config_groups": groups}, of_all("input_scale", 0.5))
    assert found.scheme.names() == {"activations": "fp8-token"}
    assert {name: how and str(how) for name, how in found.input_formats.items()} == {
        f"{UP}.weight": "fp8-tensor", f"{DOWN}.weight": None, f"{DOWN.replace('.0.', '.1.')}.weight": None,
    }  # fmt: skip
    assert found.ranges.keys() == {f"{UP}.weight"}


def test_layers_of_mixed_precision_have_their_own_algorithms(scheme):
    layers = {UP: {"quant_algo": "FP8"}, DOWN: {"quant_algo": "W4A16_AWQ"}}
    found = scheme(MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, of_all("input_scale", 1.0))
    assert found.scheme.names() == {"activations": "fp8-tensor"}
    assert found.input_formats[f"{DOWN}.weight"] is None
    assert found.ranges.keys() == {f"{UP}.weight"}


def test_mxfp4_of_weights_alone_is_known_by_its_groups(scheme):
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}
    assert scheme(MODELOPT | {"quant_algo": "MXFP4", "config_groups": groups}).scheme == Scheme()


LIMITS = {
    "zero points": (
        compressed_with({"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}),
        "int8 by token with zero points, which qeval's formats of activations have not",
    ),
    "a dynamic scale over a batch": (
        compressed_with(TOKEN | {"strategy": "tensor"}),
        "a scale over a batch would make a score depend on what is beside it",
    ),
    "another width": (compressed_with(TOKEN | {"num_bits": 6}), "float6 by token, dynamic"),
    "no scale": (compressed_with(STATIC), "fp8-tensor, whose input_scale the file has not"),
    "powers of two": (FP8 | {"scale_fmt": "ue8m0"}, "powers of two (scale_fmt ue8m0)"),
    "Model Optimizer without a scale": (
        MODELOPT | {"quant_algo": "NVFP4"},
        "nvfp4, whose input_scale the file has not",
    ),
}


@pytest.mark.parametrize("config,reason", LIMITS.values(), ids=LIMITS)
def test_what_has_no_format_is_named_and_left(scheme, config, reason):
    tiles = config["quant_method"] == "fp8"
    found = scheme(config, None, *((packers.fp8_tiles, "fp8-tile128") if tiles else (packers.fp8, "fp8-channel")))
    assert found.scheme == Scheme()
    (sentence,) = found.limits
    assert sentence.startswith("inputs of 14 of 14 linears: ") and reason in sentence


def test_a_cache_that_has_no_format_is_named(scheme):
    heads = STATIC | {"strategy": "attn_head"}
    found = scheme(compressed_with(TOKEN, kv_cache_scheme=heads))
    assert found.limits == ("keys: float8 by attn_head, static", "values: float8 by attn_head, static")
    found = scheme(MODELOPT | {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4_AFFINE"}, of_all("input_scale", 1.0))
    assert found.limits == ("keys: NVFP4_AFFINE", "values: NVFP4_AFFINE")


def test_keys_and_values_rounded_as_attentions_inputs_leave_queries(scheme):
    group = {"targets": ["LlamaAttention"], "input_activations": STATIC}
    config = compressed_with(TOKEN)
    config = config | {"config_groups": {"attention": group} | config["config_groups"]}
    found = scheme(config, of_all("k_scale", 0.5) | of_all("v_scale", 0.5))
    assert found.scheme.names() == {"activations": "fp8-token", "keys": "fp8-tensor", "values": "fp8-tensor"}
    assert found.limits == tuple(
        f"{part}: queries are rounded too, and are left as they are" for part in ("keys", "values")
    )


def test_a_scheme_without_its_caches_says_why(scheme):
    scales = of_all("k_scale", 0.5) | of_all("v_scale", 0.25) | of_all("input_scale", 0.5)
    found = scheme(compressed_with(STATIC, kv_cache_scheme=STATIC), scales).without_caches("no such attention")
    assert found.scheme.names() == {"activations": "fp8-tensor"}
    assert len(found.ranges) == 14 and found.limits == ("no such attention",)


def test_a_model_whose_attention_can_not_be_rounded_keeps_its_keys_and_values(scheme):
    read = scheme(compressed_with(TOKEN, kv_cache_scheme=STATIC))
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **LATENT})).eval()
    whole = with_external_scheme(Variant("key", {}, {}, {}, ()), read, model)
    assert whole.scheme.names() == {"activations": "fp8-token"}
    assert not whole.ranges
    assert "keys and values: " in whole.details["not rounded here"] and "latents" in whole.details["not rounded here"]


def test_the_heads_input_stays_in_float(base, baseline, tmp_path):
    head = quantize_rtn(baseline.parameters["lm_head.weight"], parse("fp8-channel"))
    config = compressed_with(TOKEN)
    folder = packers.save_checkpoint(base, tmp_path, config, {"lm_head.weight": packers.fp8(head)})
    with open_checkpoint(folder) as tensors:
        found = read_scheme(tensors, Reading(format_of(config, "here"), config, {}), baseline)
    assert found.limits == ("inputs of 1 of 1 linears: the head's input stays in float",)


def test_model_optimizers_own_file_says_what_config_json_does_not(base, tmp_path):
    folder = packers.save_checkpoint(base, tmp_path, MODELOPT | {"quant_algo": "FP8"}, {})
    own = {"quantization": {"quant_algo": "other", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(own))
    found = read_quantization(folder)
    assert (found["quant_algo"], found["kv_cache_quant_algo"]) == ("FP8", "FP8")


OTHER_TOOLS = {
    "LLM.int8()": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8()"),
    "AutoRound": ({"quant_method": "auto-round", "act_bits": 8, "act_data_type": "int"}, "int of 8 bits"),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
        "torchao's own configuration",
    ),
}


@pytest.mark.parametrize("config,reason", OTHER_TOOLS.values(), ids=OTHER_TOOLS)
def test_other_tools_activations_are_named_with_their_reason(config, reason, monkeypatch):
    monkeypatch.setattr("qeval.formats.registry.find_spec", lambda name: True)
    rounding = format_of(config, "here").inputs("m", config)
    assert rounding.how is None and reason in rounding.reason


def test_weights_alone_have_no_scheme(scheme):
    assert format_of(AWQ, "here").inputs("m", AWQ) is None
    assert scheme(CT | {"format": "float-quantized"}).scheme == Scheme()


def test_the_bound_on_rowwise_scales_is_told(scheme):
    found = scheme({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    assert found.scheme.names() == {"activations": "fp8-token"}
    assert "activation_scale_ub 1200.0) is left out" in found.limits[0]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_none_is_named(scheme, value):
    with pytest.raises(UsageError, match="input_scale is to be one positive number"):
        scheme(compressed_with(STATIC), of_all("input_scale", value))
