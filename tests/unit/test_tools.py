"""Other tools as quantizers: run for real where they install, by stand-ins of their own interface elsewhere."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qeval.calibrate.build import build, check, source_of
from qeval.calibrate.tools import registry
from qeval.config import METHODS, TOOLS, Recipe, parse_method
from qeval.errors import UsageError
from qeval.models.graph import describe
from qeval.models.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize
from tests.fixtures import packers
from tests.fixtures.tiny import save_tiny, tiny_llama

UP = "model.layers.0.mlp.up_proj.weight"
SAMPLES = [list(range(1, 65)), list(range(65, 129))]


@pytest.fixture(scope="module")
def source():
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    return source_of(model, describe(model), head_of(model), SAMPLES, {})


def installed(distribution):
    try:
        version(distribution)
    except PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")


def made(source, name):
    """The variant of a method, whose model is found untouched."""
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    variant = build(source, parse_method(name), "key", lambda done: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.model.state_dict().items())
    assert {*variant.weights, *variant.floats} == {n for group in source.description.groups for n in group.names}
    return variant


def errors(source, variant):
    """The relative errors of all matrices."""
    values = {name: weight.dequantize() for name, weight in variant.weights.items()} | dict(variant.floats)
    bases = {name: source.search.parameters[name] for name in values}
    return [float((values[name] - base).norm() / base.norm()) for name, base in bases.items()]


REAL = {
    "hqq:int4-g64": ("hqq", 0.12, 4.5),
    "hqq:int8-g64": ("hqq", 0.01, 8.5),
    "torchao:int4wo": ("torchao", 0.12, 4.5),
    "torchao:int4wo-g32-asym": ("torchao", 0.12, 5.125),
    "torchao:int8wo": ("torchao", 0.01, 8.22),
    "ort:rtn": ("onnxruntime", 0.12, 5.0),
    "ort:k_quant": ("onnxruntime", 0.12, 5.125),
    "ort:rtn-int8-g128": ("onnxruntime", 0.01, 8.25),
    "modelopt:awq_lite": ("nvidia-modelopt", 0.15, 4.26),
    "gptqmodel:int4-g64": ("gptqmodel", 0.2, 4.5),
    "gptqmodel:int8-channel": ("gptqmodel", 0.02, 8.22),
    "autoround:int4-g64-asym": ("auto-round", 0.2, 4.56),
}


@pytest.mark.parametrize("name", REAL)
def test_a_tool_that_is_installed_quantizes_every_linear(source, name):
    distribution, most, bits = REAL[name]
    installed(distribution)
    variant = made(source, name)
    assert 0 < max(errors(source, variant)) < most
    assert variant.bits_per_weight == pytest.approx(bits, abs=0.1)
    assert variant.details["made by"] == f"{distribution} {version(distribution)}"


@pytest.mark.parametrize("algorithm", ["rtn", "rtn-asym", "k_quant"])
def test_onnx_runtimes_quantizer_and_kernel_give_the_same_matrix(source, algorithm):
    """The whole of its own path as the oracle: a graph of one product, quantized by it and multiplied by ones."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    weight = source.search.parameters[UP].float().numpy()
    config = {
        "rtn": quantizer.RTNWeightOnlyQuantConfig(),
        "rtn-asym": quantizer.RTNWeightOnlyQuantConfig(),
        "k_quant": quantizer.KQuantWeightOnlyQuantConfig(),
    }[algorithm]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, weight.shape[1]])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, weight.shape[0]])],
        [onnx.numpy_helper.from_array(weight.T.copy(), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    symmetric = algorithm == "rtn"
    made_by_ort = quantizer.MatMulNBitsQuantizer(
        model, block_size=32, is_symmetric=symmetric, accuracy_level=1, algo_config=config
    )
    made_by_ort.process()
    session = runtime.InferenceSession(made_by_ort.model.model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float32)})[0].T
    ours = made(source, f"ort:{algorithm}").weights[UP].dequantize()
    assert torch.allclose(ours, torch.from_numpy(values), atol=1e-6)


def test_names_mean_what_the_tools_mean():
    for name, grid, algorithm in (
        ("hqq", "int4-g64", None),
        ("hqq:int8", "g64-int8", None),
        ("torchao", "int4-g64", "int4wo"),
        ("torchao:int8wo", "int8-channel", "int8wo"),
        ("ort:k_quant-g128", "int4-asym-g128", "k_quant"),
        ("modelopt:awq_lite", "int4-g128", "awq_lite"),
    ):
        recipe = parse_method(name)
        assert (recipe.grid, recipe.algorithm, recipe.name) == (grid, algorithm, name)
        parse(recipe.grid)
    assert set(TOOLS) == set(registry.TOOLS) <= set(METHODS)


def test_algorithms_count_in_an_identity_and_own_methods_keep_theirs():
    assert parse_method("ort:rtn-asym").identity() != parse_method("ort:k_quant").identity()
    assert "algorithm" not in parse_method("rtn").identity()


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_missing_is_named_with_its_command(source, name, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r"which is not installed: pip install"):
        check(source, parse_method(name))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ort:rtn-channel", "ort takes 4 or 8 bits in blocks, not int4-channel"),
        ("torchao:int4wo-int8", "takes 4 bits in groups that divide a row"),
        ("hqq:int5", "hqq takes .* bits in blocks or per channel"),
        ("modelopt:awq_lite-g64", "which is int4-g128"),
        ("gptqmodel:tensor", "gptqmodel takes blocks or one scale a row"),
    ],
)
def test_what_a_tool_does_not_do_is_a_sentence(source, name, sentence, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda package: package)
    monkeypatch.setattr(registry, "version", lambda distribution: "0")
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", ModuleType("mtq"))
    monkeypatch.setitem(sys.modules, "modelopt.torch", SimpleNamespace(quantization=None))
    monkeypatch.setitem(sys.modules, "modelopt", ModuleType("modelopt"))
    for package in ("torchao.quantization", "hqq.core.quantize"):
        stand_in = ModuleType(package)
        stand_in.__getattr__ = lambda name: None  # what is imported of it is never reached
        monkeypatch.setitem(sys.modules, package, stand_in)
    with pytest.raises(UsageError, match=sentence):
        build(source, parse_method(name), "key", lambda done: None)


def test_a_head_and_clips_belong_to_own_methods():
    with pytest.raises(UsageError, match="belong to qeval's own methods"):
        Recipe("hqq", "hqq", quantize_head=True)


class StandIn:
    """A tool's class that writes the folder that the real one would: GPTQ's packing of round-to-nearest's integers."""

    def __init__(self, model, samples, config, grid):
        self.model, self.samples, self.config, self.grid = model, samples, config, grid

    def write(self, folder, base):
        save_tiny(base, hidden_size=128, intermediate_size=256, dtype=torch.float32)
        weights = {n: quantize(w, parse(self.grid)) for n, w in self.model.named_parameters() if "_proj" in n}
        parts = {name: packers.gptq(weight) for name, weight in weights.items()}
        packers.save_checkpoint(base, folder, self.config, parts)
        return weights


def test_gptqmodels_folder_is_read_back(source, tmp_path, monkeypatch):
    """By a stand-in of GPTQModel's interface: `load`, `quantize`, `save`."""
    seen = {}

    class GPTQModel(StandIn):
        @classmethod
        def load(cls, folder, config):
            seen["config"] = config
            assert json.loads((Path(folder) / "config.json").read_text())["model_type"] == "llama"
            settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
            return cls(source.model, None, settings, "int4-g64")

        def quantize(self, samples):
            seen["samples"] = [sample["input_ids"] for sample in samples]

        def save(self, folder):
            seen["weights"] = self.write(Path(folder), tmp_path / "base")

    module = ModuleType("gptqmodel")
    module.GPTQModel, module.QuantizeConfig = GPTQModel, SimpleNamespace
    monkeypatch.setitem(sys.modules, "gptqmodel", module)
    monkeypatch.setattr(registry, "find_spec", lambda package: package)
    monkeypatch.setattr(registry, "version", lambda distribution: "7.7.0")
    variant = made(source, "gptqmodel:int4-g64")
    assert seen["samples"] == SAMPLES
    assert (seen["config"].bits, seen["config"].group_size, seen["config"].sym) == (4, 64, True)
    assert torch.equal(variant.weights[UP].codes, seen["weights"][UP].codes)
    assert variant.details == {"made by": "gptqmodel 7.7.0"}


def test_autorounds_folder_is_read_back(source, tmp_path, monkeypatch, capsys):
    """By a stand-in of AutoRound's interface, which saves into a folder of its own naming inside the one given."""
    seen = {}

    class AutoRound(StandIn):
        def __init__(self, folder, **settings):
            seen.update(settings)
            assert AutoTokenizer.from_pretrained(folder).pad_token_id not in {*chain(*SAMPLES)}
            super().__init__(source.model, None, {"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4-g128")

        def quantize_and_save(self, folder, format):
            seen["format"] = format
            sys.stdout.write("what a tool says\n")
            Path("logs").mkdir()
            seen["weights"] = self.write(Path(folder) / "model-w4g128", tmp_path / "base")

    module = ModuleType("auto_round")
    module.AutoRound = AutoRound
    monkeypatch.setitem(sys.modules, "auto_round", module)
    monkeypatch.setattr(registry, "find_spec", lambda package: package)
    monkeypatch.setattr(registry, "version", lambda distribution: "0.16.1")
    variant = made(source, "autoround:int4")
    assert not Path("logs").exists()
    assert capsys.readouterr().out == ""
    assert (seen["bits"], seen["group_size"], seen["format"], seen["nsamples"]) == (4, 128, "auto_gptq", 2)
    assert torch.equal(variant.weights[UP].codes, seen["weights"][UP].codes)
