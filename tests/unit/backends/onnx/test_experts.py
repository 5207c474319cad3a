"""Experts on ONNX Runtime: one node a layer, held against a plain loop and against torch with the same codes."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from qeval.backends.onnx.expert_nodes import FusedExperts, SwiGlu, activation_of, expert_modules, interleave
from qeval.backends.onnx.export import ExportTarget, OnnxExporter
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.nbits import check_kernel
from qeval.errors import UsageError
from qeval.jobs.conformance import Bench
from qeval.models.families import byte_tokenizer
from qeval.models.load import load_model
from qeval.models.silence_transformers import quiet
from qeval.models.source import resolve
from qeval.quant.grid import parse
from qeval.quantize.build import quantizable
from tests.fixtures.architectures import tiny_architecture
from tests.fixtures.families import tiny_family
from tests.fixtures.onnx import answers, graph_of, held, value

EXPERT = "model.layers.0.mlp.experts.gate_up_proj[0]"
EXACT_KL = 1e-11
METHODS = ("awq:g16", "rtn:int8-channel", "rtn:int4-g16-asym")
"""Scales folded before experts; a scale a row; zero points."""


class Exported(NamedTuple):
    bench: Bench
    exporter: OnnxExporter


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QEVAL_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module", params=["Mixtral", "GptOss"])
def exported(request, home) -> Exported:
    """Gate and up one behind the other; transposed, taking turns, with biases and a clamp."""
    made = tiny_family("Mixtral") if request.param == "Mixtral" else tiny_architecture("GptOss")
    return _exported(Bench(request.param, made), home)


def _exported(bench: Bench, home: Path, exporter: str = "dynamo", **target: Any) -> Exported:
    folder = home / bench.name
    with quiet():
        bench.model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    names = [*quantizable(bench.description), bench.description.head]
    loaded = load_model(resolve(str(folder)))
    return Exported(bench, OnnxExporter(loaded, names, exporter, 1, ExportTarget(**target)))


@pytest.mark.parametrize("limit", [None, 1.5])
def test_the_node_is_a_loop_over_the_chosen_experts(limit):
    """The routing's weights have any sum, one of them is 0, and the node's own would be another softmax."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tokens, experts, width, inner, k = 7, 5, 32, 16, 2
    x, first, second = draw(tokens, width), draw(experts, 2 * inner, width), draw(experts, width, inner)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    weights[0, 1] = 0
    activation = SwiGlu(1.702, 1.0, limit) if limit else SwiGlu()

    expected = torch.zeros(tokens, width)
    for token in range(tokens):
        for place in range(k):
            gate, up = (first[index[token, place]] @ x[token]).chunk(2)
            out = second[index[token, place]] @ activation.apply(gate, up)
            expected[token] += weights[token, place] * out

    scores = FusedExperts.scores(weights, index, experts)
    found = _moe(x, scores, interleave(first), second, activation, k) * weights.sum(1, keepdim=True)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


def _moe(x: Tensor, scores: Tensor, first: Tensor, second: Tensor, activation: SwiGlu, k: int) -> Tensor:
    inputs = [value("x", list(x.shape)), value("scores", list(scores.shape))]
    stacks = [held("first", first), None, held("second", second)]
    node = ir.node("MoE", [*inputs, *stacks], activation.attributes(k), domain="com.microsoft")
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(list(x.shape))
    graph = graph_of(inputs, [node.outputs[0]], [node], [stack for stack in stacks if stack is not None])
    return answers(graph, x=x, scores=scores)


def test_the_float_graph_and_the_codes_in_it_are_torchs(exported, home, tmp_path):
    bench, exporter = exported
    for method in METHODS:
        variant, out = bench.variant(method), tmp_path / method.replace(":", "-")
        exporter.write(variant, Style(), out)
        with bench.backend.open(variant) as session:
            assert exporter.parity(out, session).kl_nats < EXACT_KL
        operators = {node.op_type for node in ir.load(out / "model.onnx").graph}
        assert "QMoE" in operators
        assert "MoE" not in operators


def test_experts_that_stay_in_float_are_the_variants(exported, tmp_path):
    """The graph's own experts would be an octave off."""
    bench, exporter = exported
    variant = bench.variant("rtn:g16")
    experts = {name: weight for name, weight in variant.weights.items() if name.endswith("]")}
    others = {name: weight for name, weight in variant.weights.items() if name not in experts}
    floats = dict(variant.floats) | {name: 2 * weight.dequantize() for name, weight in experts.items()}
    changed = type(variant)("key", others, floats, variant.input_scales, variant.kept)
    exporter.write(changed, Style(), tmp_path / "out")
    with bench.backend.open(changed) as session:
        assert exporter.parity(tmp_path / "out", session).kl_nats < EXACT_KL


def test_experts_partly_in_float_are_refused(exported, tmp_path):
    bench, exporter = exported
    variant = bench.variant("rtn:g16")
    one = next(name for name in variant.weights if name.endswith("]"))
    weights = {name: weight for name, weight in variant.weights.items() if name != one}
    floats = dict(variant.floats) | {one: variant.weights[one].dequantize()}
    changed = type(variant)("key", weights, floats, variant.input_scales, variant.kept)
    with pytest.raises(UsageError, match="some of them are quantized and others stay in float"):
        exporter.write(changed, Style(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grid", "columns", "sentence"),
    [
        ("int8-g32", 64, "rounds activations where experts have 8 bits in blocks"),
        ("int4-g40", 120, "no block that fills an expert's row of 120 weights in groups of 40"),
        ("nvfp4", 64, "multiplies by integers of 4 or 8 bits, not by nvfp4"),
    ],
)
def test_grids_that_the_node_does_not_read_are_refused_before_any_work(grid, columns, sentence):
    with pytest.raises(UsageError, match=sentence):
        check_kernel(EXPERT, parse(grid), columns)


@pytest.mark.parametrize(("grid", "columns"), [("int4-g128", 2880), ("int8-channel", 50), ("int3-channel", 48)])
def test_grids_that_the_node_reads_are_taken(grid, columns):
    check_kernel(EXPERT, parse(grid), columns)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Llama4", "not called as transformers calls others"),
        ("Gemma4", "activated by something else than SwiGLU"),
        ("NemotronH", "have no gate"),
    ],
)
def test_experts_that_no_node_computes_are_refused_before_any_work(name, sentence, home):
    with pytest.raises(UsageError, match=rf"{sentence}.*--backend torch"):
        _exported(Bench(name, tiny_architecture(name)), home)


@pytest.mark.parametrize(("exporter", "target"), [("genai", {}), ("auto", {"ep": "cuda", "precision": "fp16"})])
def test_the_model_builder_is_not_asked_for_experts(exporter, target, home):
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UsageError, match="model builder rounds itself; take --exporter dynamo"):
        _exported(Bench("Mixtral", tiny_family("Mixtral")), home, exporter, **target)


def test_the_activation_is_found_by_calling_it():
    found = {
        name: activation_of(name, experts) for name, experts in expert_modules(tiny_architecture("GptOss")).items()
    }
    assert set(found.values()) == {SwiGlu(1.702, 1.0, 7.0)}
