"""The graph that torch's exporter gives: the model's logits, whatever the batch, the past and the padding."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from qeval.backends.onnx.dynamo import _reason, export_dynamo
from qeval.errors import QevalError
from qeval.models.silence_transformers import quiet
from tests.fixtures.architectures import tiny_architecture
from tests.fixtures.families import SIZES, tiny_family

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Array = NDArray[Any]
WINDOW = 8
PREFIX = 17
LENGTH = 40
GEMMA3 = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.15}
EXPORT_ALL = """
import sys
from pathlib import Path
from qeval.backends.onnx.dynamo_child import export_graph
for folder in sys.argv[1:]:
    export_graph(Path(folder), Path(folder))
"""
"""One process for several: importing torch's exporter takes longer than a tiny export."""


def _random_gains(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**(SIZES | GEMMA3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _random_gains(transformers.Gemma3ForCausalLM(config))


def _gpt2() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _random_gains(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)))


MODELS = {
    "llama-tied": lambda: tiny_family("Llama", tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: tiny_family("Mistral", sliding_window=WINDOW),
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}
"""A tied head and biases; a window in all layers; one in some, and 1 + weight; Conv1D and LayerNorm."""


@dataclass(frozen=True, eq=False)
class Exported:
    """A model, the folder of its graph, and a session of it."""

    model: Any
    folder: Path
    session: Any

    def run(self, ids: Array, past: Sequence[Array] = (), mask: Array | None = None) -> tuple[Array, list[Array]]:
        """The logits of `ids` [batch, sequence], and each layer's keys and values."""
        inputs = {i.name: i.shape for i in self.session.get_inputs()}
        names = [name for name in inputs if name.startswith("past_key_values.")]
        past = past or [np.zeros((len(ids), inputs[n][1], 0, inputs[n][3]), np.float32) for n in names]
        seen = np.ones((len(ids), past[0].shape[2] + ids.shape[1]), np.int64) if mask is None else mask
        logits, *present = self.session.run(
            None, {"input_ids": ids, "attention_mask": seen} | dict(zip(names, past, strict=True))
        )
        return logits, present

    def expected(self, ids: Array) -> Array:
        """The logits that transformers computes, without keys and values."""
        with torch.inference_mode():
            logits: Array = self.model(torch.from_numpy(ids), use_cache=False).logits.numpy()
        return logits


@pytest.fixture(scope="session")
def all_exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    models = {name: make() for name, make in MODELS.items()}
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    with quiet():
        for name, model in models.items():
            model.save_pretrained(folders[name])
    first, *others = folders.values()
    with subprocess.Popen([sys.executable, "-c", EXPORT_ALL, *map(str, others)], stderr=subprocess.PIPE) as meanwhile:
        export_dynamo(first, first)
        _, noise = meanwhile.communicate()
    assert meanwhile.returncode == 0, noise.decode()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    cpu = ["CPUExecutionProvider"]
    return {
        name: Exported(models[name], folder, ort.InferenceSession(str(folder / "model.onnx"), options, providers=cpu))
        for name, folder in folders.items()
    }


@pytest.fixture(params=MODELS)
def exported(request: pytest.FixtureRequest, all_exported: dict[str, Exported]) -> Exported:
    return all_exported[request.param]


@pytest.fixture
def ids() -> Array:
    """Three rows with a common prefix."""
    tokens = np.random.default_rng(0).integers(1, 250, (3, LENGTH))
    tokens[:, :PREFIX] = tokens[0, :PREFIX]
    return tokens


def _mean_kl(expected: Array, found: Array) -> float:
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _apart(one: Array, other: Array) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def test_the_logits_are_the_models(exported: Exported, ids: Array):
    expected, (found, _) = exported.expected(ids), exported.run(ids)
    assert found.dtype == np.float32
    assert _mean_kl(expected, found) < 1e-9
    assert _apart(expected, found) < 1e-3
    assert _apart(expected, exported.expected(np.flip(ids, 0).copy())) > 0.1, "the test could tell"


def test_a_single_token_is_no_special_case(exported: Exported, ids: Array):
    found, present = exported.run(ids[:1, :1])
    assert _apart(exported.expected(ids[:1, :1]), found) < 1e-4
    assert {part.shape[2] for part in present} == {1}


def test_a_batch_continues_a_prefix(exported: Exported, ids: Array):
    """The prefix alone, lent to three rows, gives what the whole rows give; so does one more token at a time."""
    whole, kept = exported.run(ids)
    _, prefix = exported.run(ids[:1, :PREFIX])
    found, present = exported.run(ids[:, PREFIX:], [np.repeat(part, 3, axis=0) for part in prefix])
    assert _apart(whole[:, PREFIX:], found) < 1e-4
    assert max(_apart(*parts) for parts in zip(kept, present, strict=True)) < 1e-4
    last, _ = exported.run(ids[:, -1:], [part[:, :, :-1] for part in kept])
    assert _apart(whole[:, -1:], last) < 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_padding_on_the_right_is_harmless(exported: Exported, ids: Array, masked: bool):
    """A padded row's states beyond its window see nothing but padding, and must not become NaN for the others."""
    lengths = (LENGTH, 25, 1)
    mask = np.stack([np.arange(LENGTH) < length for length in lengths]).astype(np.int64)
    whole, _ = exported.run(ids)
    found, present = exported.run(ids * mask, mask=mask if masked else None)
    for row, length in enumerate(lengths):
        assert _apart(whole[row, :length], found[row, :length]) < 1e-4
    assert all(np.isfinite(part).all() for part in present)


def test_a_row_sees_no_further_than_its_window(all_exported: dict[str, Exported], ids: Array):
    """Two layers of window 8 carry a change 14 tokens on and no further; nor is it seen through a past."""
    mistral, changed = all_exported["mistral"], ids.copy()
    changed[:, 0] += 1
    reach = 2 * (WINDOW - 1)
    (before, past), (after, _) = mistral.run(ids), mistral.run(changed)
    assert _apart(before[:, reach], after[:, reach]) > 0
    assert _apart(before[:, reach + 1 :], after[:, reach + 1 :]) == 0
    spoilt = [np.concatenate([part[:, :, :1] + 9, part[:, :, 1:PREFIX]], axis=2) for part in past]
    continued, _ = mistral.run(ids[:, PREFIX:], spoilt)
    assert _apart(before[:, PREFIX:], continued) < 1e-4


def test_the_interface_is_the_builders(exported: Exported):
    inputs = {i.name: (i.type, i.shape) for i in exported.session.get_inputs()}
    outputs = {o.name: (o.type, o.shape) for o in exported.session.get_outputs()}
    heads = inputs["past_key_values.0.key"][1][1]
    past = ["batch_size", heads, "past_sequence_length", 16]
    present = ["batch_size", heads, "total_sequence_length", 16]
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert inputs == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
        **{f"past_key_values.{part}": ("tensor(float)", past) for part in parts},
    }
    assert outputs == {
        "logits": ("tensor(float)", ["batch_size", "sequence_length", 256]),
        **{f"present.{part}": ("tensor(float)", present) for part in parts},
    }


def test_every_weight_is_found_in_the_form_that_the_docs_say(exported: Exported):
    graph = ir.load(exported.folder / "model.onnx").graph
    assert not {node.domain for node in graph} - {""}
    by_name = {node.name: node for node in graph}
    parameters = dict(exported.model.named_parameters())
    linears = [n for n, m in exported.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    for name in linears:
        if f"{name}.weight" in parameters:  # else it is tied
            weight = parameters[f"{name}.weight"].numpy()
            is_conv = type(exported.model.get_submodule(name)).__name__ == "Conv1D"
            node = by_name[name]
            assert (node.op_type, node.inputs[1].name) == ("MatMul", f"{name}.weight")
            np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), weight if is_conv else weight.T)
    values = [value.const_value.numpy() for value in graph.initializers.values()]
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            wanted = (parameter.numpy(), 1 + parameter.numpy())
            assert any(np.array_equal(value, w) for value in values for w in wanted), name


def test_a_tied_embedding_is_stored_once(all_exported: dict[str, Exported]):
    for name, embedding in (("llama-tied", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")):
        graph = ir.load(all_exported[name].folder / "model.onnx").graph
        users = {node.op_type: node for node, _ in graph.initializers[embedding].uses()}
        ((head, place),) = users["Transpose"].outputs[0].uses()
        assert (set(users), head.op_type, place) == ({"Gather", "Transpose"}, "MatMul", 1)


def test_weights_lie_outside_the_graph_and_once(exported: Exported):
    """The graph's own file holds no weight, so that a model of any size can be written."""
    sizes = {name: 4 * p.numel() for name, p in exported.model.named_parameters()}
    matrices = sum(sizes[name] for name, p in exported.model.named_parameters() if p.dim() > 1)
    values = ir.load(exported.folder / "model.onnx").graph.initializers.values()
    assert sum(sizes.values()) <= sum(value.const_value.nbytes for value in values) < sum(sizes.values()) + 4096
    assert (exported.folder / "model.onnx.data").stat().st_size >= matrices
    assert (exported.folder / "model.onnx").stat().st_size < 100_000


def test_stacks_of_matrices_that_no_node_multiplies_by_are_refused_by_name(tmp_path: Path):
    with quiet():
        tiny_architecture("Llama4").save_pretrained(tmp_path)
    with pytest.raises(QevalError) as told:
        export_dynamo(tmp_path, tmp_path / "onnx")
    stack = "model.layers.1.feed_forward.experts.gate_up_proj, 4x64x96"
    expected = f"Llama4ForCausalLM holds many matrices in one tensor ({stack})"
    assert str(told.value) == f"torch's ONNX exporter can't take '{tmp_path}': {expected}."


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (1, "Traceback\n  noise\nRuntimeError: the last line.\n\n", "RuntimeError: the last line"),
        (-9, "noise", "its process was ended by signal 9, most likely for want of memory"),
        (-11, "", "its process was ended by signal 11"),
        (3, " \n", "its process ended with exit code 3 and said nothing"),
    ],
)
def test_a_failure_is_one_sentence(code: int, stderr: str, reason: str):
    assert _reason(subprocess.CompletedProcess([], code, "", stderr)) == reason
