"""Rotated models in exported graphs: R1 and R2 in its floats, R4 by nodes, beside torch."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

import onnx_ir as ir

from qeval.backends.onnx.insert_rotation import turned_input
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.inspection import inspect_folder
from qeval.config import parse_method
from qeval.metrics.tokens import near_kl
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.quant.rotation import random_rotation, turn_runs
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.rotating import rotated_model
from qeval.types import Request
from tests.fixtures.onnx import (
    answers,
    apart,
    exporter,
    graph_of,
    loaded,
    ort_session,
    shared_home,
    torch_backend,
    value,
)

TOKENS = tuple(torch.randint(2, 250, (40,), generator=torch.Generator().manual_seed(5)).tolist())
REQUEST = Request(TOKENS, tuple(range(40)))


@pytest.mark.parametrize("size", [8, 12, 256, 28 * 64 * 2, 43])
def test_nodes_turn_an_input_as_torch_does(size):
    core = random_rotation(size, 0, signs=False).core.float()
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(1))
    source = value("x", [2, 3, size])
    graph = graph_of([source], [], [ir.node("Identity", [source], name="first")], [])
    found = turned_input(graph, source, core, size, "proj")
    found.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(found)
    assert apart(answers(graph, x=x), turn_runs(x, core, size)) < 1e-6


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(shared_home()))


def rotated(name, method):
    """A rotated variant of one of the models."""
    model, recipe = loaded(name).model, parse_method(method)
    description, head = describe_model(model), head_of(model)
    with rotated_model(model, description, head, recipe.rotations) as turned:
        source = source_of(model, turned.description, turned.head, [], {})
        return turned.completed(build_variant(source, recipe, "key", lambda done: None))


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("llama", "rtn:int8-channel+r1r2"),
        ("tied", "rtn:int4-g32+r1r2r4"),
        ("tied", "rtn:int8-channel-head+r1r2"),
        ("qwen2", "rtn:int8-channel+r1r2r4"),
        ("gemma3", "rtn:int8-channel+r2"),
    ],
)
def test_an_exported_folder_answers_as_torch_does_with_the_rotated_model(model, method, home, tmp_path):
    variant, out = rotated(model, method), tmp_path / "out"
    exporter(model).write(variant, Style(), out)
    session = ort_session(out)
    with torch_backend(model).open(variant) as ours, torch.inference_mode():
        states = ours.states([REQUEST])[0], session.states([REQUEST])[0]
        assert float(near_kl(ours.logits, states[0], session.logits, states[1]).mean()) < 1e-8


def test_a_tied_head_becomes_a_matrix_of_its_own(home, tmp_path):
    variant = rotated("tied", "rtn:int4-g32+r1")
    exporter("tied").write(variant, Style(), tmp_path / "out")
    facts = inspect_folder(tmp_path / "out", needs_tokenizer=False)
    assert facts.head.weight != facts.embedding.weight
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    stored = graph.initializers[facts.head.weight].const_value.numpy()
    assert np.array_equal(stored.T, variant.floats["lm_head.weight"].numpy())
