"""Other tools as quantizers: run for real where they install, by stand-ins of their own interface elsewhere."""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qeval.config import Recipe, parse_method
from qeval.errors import UsageError
from qeval.methods import METHODS
from qeval.models.families import tiny_family
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quantize.build import build_variant, possible_grids, source_of
from qeval.quantize.tools import registry
from tests.fixtures import packers
from tests.fixtures.tiny import tiny_llama

UP = "model.layers.0.mlp.up_proj.weight"
TOOLS = [name for name, method in METHODS.items() if method.rounding == "external"]
SAMPLES = [list(range(1, 65)), list(range(65, 129))]


@pytest.fixture(scope="module")
def source():
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    return source_of(model, describe_model(model), head_of(model), SAMPLES, {})


def installed(distribution):
    try:
        version(distribution)
    except PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")


def made(source, name):
    """The variant of a method, whose model is found untouched."""
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    variant = build_variant(source, parse_method(name), "key", lambda done: None)
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
    "ort:default": ("onnxruntime", 0.12, 5.0),
    "ort:default-int8-asym": ("onnxruntime", 0.01, 9.25),
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


@pytest.mark.parametrize("algorithm", ["rtn", "rtn-asym", "k_quant", "default", "default-asym"])
def test_onnx_runtimes_quantizer_and_kernel_give_the_same_matrix(source, algorithm):
    """The whole of its own path as the oracle: a graph of one product, quantized by it and multiplied by ones."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    weight = source.search.parameters[UP].float().numpy()
    config = {
        "rtn": quantizer.RTNWeightOnlyQuantConfig(),
        "rtn-asym": quantizer.RTNWeightOnlyQuantConfig(),
        "k_quant": quantizer.KQuantWeightOnlyQuantConfig(),
    }.get(algorithm)  # without one it is the default
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, weight.shape[1]])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, weight.shape[0]])],
        [onnx.numpy_helper.from_array(weight.T.copy(), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    symmetric = algorithm in ("rtn", "default")
    made_by_ort = quantizer.MatMulNBitsQuantizer(
        model, block_size=32, is_symmetric=symmetric, accuracy_level=1, algo_config=config
    )
    made_by_ort.process()
    session = runtime.InferenceSession(made_by_ort.model.model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float32)})[0].T
    ours = made(source, f"ort:{algorithm}").weights[UP].dequantize()
    assert torch.allclose(ours, torch.from_numpy(values), atol=1e-6)


@pytest.mark.parametrize(("algorithm", "span"), [("default", "signed"), ("rtn", "half")])
@pytest.mark.parametrize("words", ["int4-g32", "int4-g128", "int8-g32"])
def test_onnx_runtimes_quantizers_span_their_range_as_qevals_words_say(source, algorithm, span, words):
    pytest.importorskip("onnxruntime")
    theirs = made(source, f"ort:{algorithm}-{words}").weights[UP]
    ours = quantize_rtn(source.search.parameters[UP].float(), parse(f"{words}-{span}"))
    torch.testing.assert_close(theirs.scales, ours.scales, rtol=1e-6, atol=0)
    same = float((theirs.codes == ours.codes).float().mean())
    assert same > (0.999 if span == "signed" else 0.98)  # half: the largest of a block lies on a tie


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
    assert set(TOOLS) == set(registry.TOOLS)


def test_algorithms_count_in_an_identity_and_own_methods_keep_theirs():
    assert parse_method("ort:rtn-asym").identity() != parse_method("ort:k_quant").identity()
    assert "algorithm" not in parse_method("rtn").identity()


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_missing_is_named_with_its_command(source, name, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r"which is not installed: pip install"):
        possible_grids(source, parse_method(name))


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
        build_variant(source, parse_method(name), "key", lambda done: None)


def test_a_head_and_clips_belong_to_own_methods():
    with pytest.raises(UsageError, match="belong to qeval's own methods"):
        Recipe("hqq", "hqq", quantize_head=True)


class StandIn:
    """A tool's class that writes the folder that the real one would: GPTQ's packing of round-to-nearest's integers."""

    LINEARS = r"(_proj|experts\.\d+\.w\d)\.weight"

    def __init__(self, model, samples, config, grid):
        self.model, self.samples, self.config, self.grid = model, samples, config, grid

    def write(self, folder, base):
        self.model.save_pretrained(base)
        tensors = load_file(base / "model.safetensors")  # an expert's gate and up lie apart in it
        weights = {n: quantize_rtn(w, parse(self.grid)) for n, w in tensors.items() if re.search(self.LINEARS, n)}
        parts = {name: packers.gptq(weight) for name, weight in weights.items()}
        packers.save_checkpoint(base, folder, self.config, parts)
        return weights


def gptqmodel_of(model, base, size, seen):
    """GPTQModel's interface: `load`, `quantize`, `save`."""

    class GPTQModel(StandIn):
        @classmethod
        def load(cls, folder, config):
            seen["config"] = config
            assert json.loads((Path(folder) / "config.json").read_text())["model_type"] == model.config.model_type
            return cls(model, None, {"quant_method": "gptq", "bits": 4, "group_size": size}, f"int4-g{size}")

        def quantize(self, samples):
            seen["samples"] = [sample["input_ids"] for sample in samples]

        def save(self, folder):
            seen["weights"] = self.write(Path(folder), base)

    return {"GPTQModel": GPTQModel, "QuantizeConfig": SimpleNamespace}


def auto_round_of(model, base, size, seen):
    """AutoRound's interface, which saves into a folder of its own naming inside the one given."""

    class AutoRound(StandIn):
        def __init__(self, folder, **settings):
            seen.update(settings)
            assert AutoTokenizer.from_pretrained(folder).pad_token_id not in {*chain(*SAMPLES)}
            super().__init__(model, None, {"quant_method": "gptq", "bits": 4, "group_size": size}, f"int4-g{size}")

        def quantize_and_save(self, folder, format):
            seen["format"] = format
            sys.stdout.write("what a tool says\n")
            Path("logs").mkdir()
            seen["weights"] = self.write(Path(folder) / "model-w4", base)

    return {"AutoRound": AutoRound}


@pytest.fixture
def standing_in(tmp_path, monkeypatch):
    """Puts a stand-in in a tool's place; what it was given and what it wrote is in the dict that comes back."""

    def put(package, interface, model, size):
        seen = {}
        module = ModuleType(package)
        vars(module).update(interface(model, tmp_path / "base", size, seen))
        monkeypatch.setitem(sys.modules, package, module)
        monkeypatch.setattr(registry, "find_spec", lambda package: package)
        monkeypatch.setattr(registry, "version", lambda distribution: "7.7.0")
        return seen

    return put


def test_gptqmodels_folder_is_read_back(source, standing_in):
    seen = standing_in("gptqmodel", gptqmodel_of, source.model, 64)
    variant = made(source, "gptqmodel:int4-g64")
    assert seen["samples"] == SAMPLES
    assert (seen["config"].bits, seen["config"].group_size, seen["config"].sym) == (4, 64, True)
    assert torch.equal(variant.weights[UP].codes, seen["weights"][UP].codes)
    assert variant.details == {"made by": "gptqmodel 7.7.0"}


def test_autorounds_folder_is_read_back(source, standing_in, capsys):
    seen = standing_in("auto_round", auto_round_of, source.model, 128)
    variant = made(source, "autoround:int4")
    assert not Path("logs").exists()
    assert capsys.readouterr().out == ""
    assert (seen["bits"], seen["group_size"], seen["format"], seen["nsamples"]) == (4, 128, "auto_gptq", 2)
    assert torch.equal(variant.weights[UP].codes, seen["weights"][UP].codes)


@pytest.mark.parametrize(
    ("name", "package", "interface"),
    [("gptqmodel:int4-g16", "gptqmodel", gptqmodel_of), ("autoround:int4-g16", "auto_round", auto_round_of)],
)
def test_experts_that_a_tool_leaves_one_by_one_are_the_models_stack(standing_in, name, package, interface):
    """Both tools' folders name experts as Mixtral's files do; gate and up are the rows of one matrix."""
    model = tiny_family("Mixtral", num_hidden_layers=1)
    mixture = source_of(model, describe_model(model), head_of(model), SAMPLES, {})
    seen = standing_in(package, interface, model, 16)
    variant = made(mixture, name)
    files = "model.layers.0.block_sparse_moe.experts.2"
    gate, up, down = (seen["weights"][f"{files}.{each}.weight"] for each in ("w1", "w3", "w2"))
    stack = "model.layers.0.mlp.experts"
    assert torch.equal(variant.weights[f"{stack}.gate_up_proj[2]"].codes, torch.cat([gate.codes, up.codes]))
    assert torch.equal(variant.weights[f"{stack}.down_proj[2]"].codes, down.codes)
