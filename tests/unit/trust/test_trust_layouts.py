"""Defended: ONNX models in the layouts and types that people have are opened, and answer as the plain ones do."""

import shutil

import numpy as np
import pytest
import torch

from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.providers import choose_provider
from qeval.bench.engines.onnxruntime import OrtEngine
from qeval.errors import UsageError
from qeval.models.onnx_layout import is_onnx, onnx_folder
from qeval.types import Request
from tests.fixtures.tiny import save_tiny
from tests.fixtures.tiny_graph import write_graph

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    save_tiny(tmp_path / "m")
    return made(tmp_path, ir.DataType.INT64)


def made(tmp_path, ids):
    """A folder with a graph that takes its ids in a type, transformers' configuration and a tokenizer."""
    folder = tmp_path / ids.name
    folder.mkdir()
    write_graph(folder, ids)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "m" / name, folder)
    return folder


@pytest.fixture
def split(folder, tmp_path):
    """The same model, its graph in onnx/ and the rest in the root, as Optimum leaves it."""
    root = tmp_path / "split"
    (root / "onnx").mkdir(parents=True)
    for path in folder.iterdir():
        path_in = root / "onnx" if path.name.startswith("model.onnx") else root
        if path.name != "genai_config.json":
            shutil.copy(path, path_in)
    return root


def states(folder):
    with opened(folder, choose_provider("cpu"), threads=1) as found:
        return found.session.states([Request((5, 6, 7, 8), (0, 3)), Request((9, 10), (1,))]), found.session.sharing


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1] == other[1]


def generated(folder):
    engine = OrtEngine(folder)
    engine.reset(1, 16)
    tokens = [engine.prefill(np.array([[5, 6, 7]]))]
    for _ in range(4):
        tokens.append(engine.step(tokens[-1]))
    engine.close()
    return [int(token[0]) for token in tokens]


def test_int32_ids_answer_as_int64_ones(folder, tmp_path):
    other = made(tmp_path, ir.DataType.INT32)
    assert states(folder)[1] == "batch"
    assert same(states(other), states(folder))
    assert generated(other) == generated(folder)


def test_other_types_of_ids_are_named(folder, tmp_path):
    with pytest.raises(UsageError, match=r"takes 'input_ids' as FLOAT; qeval feeds int64 and int32"):
        states(made(tmp_path, ir.DataType.FLOAT))


def test_the_graph_may_lie_below_its_configuration(folder, split):
    before = states(folder)
    for path in (split, split / "onnx", split / "onnx" / "model.onnx"):
        assert is_onnx(path)
        assert same(states(onnx_folder(path)), before)


def test_a_plain_folder_and_its_graph_are_the_same(folder):
    assert onnx_folder(folder) == folder
    assert same(states(onnx_folder(folder / "model.onnx")), states(folder))


def test_of_several_graphs_one_is_to_be_named(split, folder):
    shutil.copy(split / "onnx" / "model.onnx", split / "onnx" / "model_fp16.onnx")
    with pytest.raises(UsageError, match=r"holds several models: give the path of one, .*model\.onnx"):
        onnx_folder(split)
    assert same(states(onnx_folder(split / "onnx" / "model.onnx")), states(folder))


def test_links_hold_no_code(split):
    for name in ("ops.so", "modeling_x.py", "run.sh"):
        (split / name).write_text("x")
        (split / "onnx" / name).write_text("x")
    names = {path.name for path in onnx_folder(split).iterdir()}
    assert not {"ops.so", "modeling_x.py", "run.sh"} & names
    assert {"model.onnx", "config.json", "tokenizer.json"} <= names


def test_a_checkpoint_with_graphs_beside_it_stays_a_checkpoint(split):
    assert is_onnx(split)
    (split / "model.safetensors").write_bytes(b"x")
    assert not is_onnx(split)
