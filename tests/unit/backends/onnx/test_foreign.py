"""ONNX folders that others made, given to `qeval compare`: what is refused, and what is left out and said."""

import json
import shutil

import pytest

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

import numpy as np
import onnx_ir as ir
import torch

from qeval.backends.base import Saved
from qeval.backends.onnx.backend import FolderBackend
from qeval.backends.onnx.providers import choose_provider
from qeval.types import Request
from tests.fixtures.bench import Bench, refusing
from tests.fixtures.broken_onnx import FOLDERS, edited
from tests.fixtures.foreign import built, edit, numbers, put, uneven
from tests.fixtures.onnx import checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench whose model is that of the foreign folders. Tests only read it."""
    bench = Bench(tmp_path_factory.mktemp("foreign"))
    shutil.rmtree(bench.model)
    shutil.copytree(uneven(), bench.model)
    return bench


@pytest.fixture(autouse=True)
def home(place, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))


@pytest.fixture
def refused(place, tmp_path, capfd):
    """Runs `compare`, which must refuse; returns the sentence."""
    return refusing(place, tmp_path / "out", capfd)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(built("int4"), tmp_path / "copy")


def swapped(graph):
    codes = numbers(graph, "model.layers.1.mlp.down_proj.MatMul.weight_Q4")
    put(graph, "model.layers.1.mlp.down_proj.MatMul.weight_Q4", (codes >> 4) | (codes << 4))


BROKEN = FOLDERS | {
    "swapped nibbles": (
        edited(swapped), "model.layers.1.mlp.down_proj.weight is not the baseline's: the relative error is 1.",
        "its nibbles are swapped along the columns (nothing else of its 19 parameters is wrong).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_be_compared_is_refused(refused, copy, what):
    spoil, *sentences = BROKEN[what]
    spoil(copy)
    told = refused("--variant", f"theirs={copy}")
    for sentence in sentences:
        assert sentence in told


def test_a_smaller_vocabulary_is_refused(refused, copy):
    told = refused("--variant", f"theirs={copy}", model=str(checkpoint("qwen2")))
    assert "gives logits of 256 ids, the baseline of 264: it has no probability for ids 256 to 263" in told


def wider(graph):
    """Eight more ids than the tokenizer has, as where a vocabulary is padded."""
    head = next(node for node in graph if node.outputs[0].name == "logits")
    for value in head.inputs[1:3]:
        rows = numbers(graph, value.name)
        put(graph, value.name, np.concatenate([rows, rows[:8]]))
    head.attributes["N"] = ir.AttrInt64("N", 264)
    graph.outputs[0].shape = ir.Shape([*graph.outputs[0].shape[:2], 264])


def test_ids_beyond_the_baselines_are_left_out_and_said(place, copy, tmp_path):
    edit(copy, wider)
    out, flags = tmp_path / "out", ("--variant", f"theirs={copy}", "--quiet")
    assert place.compare(*flags, methods=None, tasks="kl", out=str(out)) == 0
    (theirs,) = json.loads((out / "run.json").read_text())["variants"]
    assert theirs["details"]["padding"].startswith("its head has the ids 256 to 263 beyond")
    assert theirs["details"]["compared"] == "12 of its 12 matrices with the baseline's weights"
    with FolderBackend(choose_provider("cpu"), 1, ids=256).open(Saved(copy)) as session:
        states = session.states([Request((5, 6, 7), (0, 2))])[0]
        kept = session.logits(states)
        session.leave_out_padding(264)
        assert (session.vocab_size, kept.shape) == (264, (2, 256))
        assert torch.equal(kept, session.logits(states)[:, :256])
