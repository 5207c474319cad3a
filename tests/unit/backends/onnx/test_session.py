"""Beyond the sessions' contract: torch's answers from ONNX Runtime's kernels, and failures that are told."""

import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

import numpy as np
import onnxruntime as ort

from qeval.backends.onnx.decoder import COUNT, Decoder, PastInput
from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.session import OrtSession
from qeval.backends.onnx.values import DeviceValues
from qeval.bench.engines.onnxruntime import OrtEngine
from qeval.errors import QevalError, UsageError
from qeval.types import Request
from tests.fixtures.hub import in_hub_cache
from tests.fixtures.onnx import ROPE_LIMIT, float_folder, ort_session, torch_backend

NATS = 1e-4
GRAPHS = ("llama", "gemma3", "olmo2")


def tokens(count, seed=0):
    return tuple(torch.randint(2, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture(scope="module")
def sessions():
    return {name: ort_session(float_folder(name)) for name in (*GRAPHS, "phi3")}


def log_p(session, request, prefix=None):
    return session.logits(session.states([request], prefix)[0]).log_softmax(-1)


def of_torch(name, request):
    with torch.inference_mode(), torch_backend(name).open(None) as session:
        return log_p(session, request)


def apart(one, other):
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", GRAPHS)
def test_a_chunked_prefill_is_the_whole(sessions, name):
    """Prefix and continuations, one at a time or batched, within 1e-4 nats of torch's whole sequence."""
    session, prefix = sessions[name], tokens(30)
    kept = session.prefill(prefix)
    rests = [tokens(n, seed=n) for n in (4, 19, 1)]
    batched = session.states([Request(rest, tuple(range(len(rest)))) for rest in rests], kept)
    for rest, states in zip(rests, batched, strict=True):
        whole = Request(prefix + rest, tuple(range(30, 30 + len(rest))))
        expected = of_torch(name, whole)
        assert apart(session.logits(states).log_softmax(-1), expected) <= NATS
        assert apart(log_p(session, whole), expected) <= NATS


def test_a_prefix_may_be_continued_by_batches_of_any_size(sessions):
    session, kept = sessions["olmo2"], sessions["olmo2"].prefill(tokens(12))
    requests = [Request(tokens(5, seed=i), (4,)) for i in range(4)]
    alone = [session.states([request], kept)[0] for request in requests]
    for count in (4, 2, 4):
        for one, other in zip(session.states(requests[:count], kept), alone[:count], strict=True):
            assert apart(one, other) <= NATS


@pytest.mark.parametrize("only", ["*", "*.data"])
def test_a_folder_of_the_hubs_cache_answers_like_its_files(sessions, tmp_path, only):
    """Links out of the folder, where ONNX Runtime follows none for a graph in memory: scored, served, told apart."""
    folder, request = in_hub_cache(float_folder("olmo2"), tmp_path, only=only), Request(tokens(9), (0, 8))
    assert (folder / "model.onnx.data").is_symlink()
    assert torch.equal(log_p(ort_session(folder), request), log_p(sessions["olmo2"], request))
    facts = inspect_folder(folder, needs_tokenizer=False)
    assert facts.data_folder == tmp_path / "blobs"
    assert facts.weights == inspect_folder(float_folder("olmo2"), needs_tokenizer=False).weights
    assert [file.name for file in facts.contents][-1] == "model.onnx.data"
    assert OrtEngine(folder).max_length == facts.context_length


@pytest.mark.parametrize("length", [ROPE_LIMIT - 1, ROPE_LIMIT, ROPE_LIMIT + 1, ROPE_LIMIT + 2, 40])
def test_longrope_turns_each_sequence_by_its_own_length(sessions, length):
    """Batched with one of the other side, padded past the limit, after a prefix on this side of it: torch's answer."""
    session, ids = sessions["phi3"], tokens(length)
    expected = of_torch("phi3", Request(ids, (length - 1,)))
    assert apart(log_p(session, Request(ids, (length - 1,))), expected) <= NATS
    others = [Request(tokens(n, seed=n), (n - 1,)) for n in (3, 60)]
    batched = session.states([others[1], Request(ids, (length - 1,)), others[0]])[1]
    assert apart(session.logits(batched).log_softmax(-1), expected) <= NATS
    kept = session.prefill(ids[:10])
    batched = session.states([others[1], Request(ids[10:], (length - 11,)), others[0]], kept)[1]
    assert apart(session.logits(batched).log_softmax(-1), expected) <= NATS


def test_longrope_is_told_by_the_graph_or_by_config_json(tmp_path, monkeypatch):
    """The limit also stands where older configurations have it; a folder that doesn't tell is taken as it is."""
    folder = shutil.copytree(float_folder("phi3"), tmp_path / "phi3")
    ids = Request(tokens(ROPE_LIMIT), (0, ROPE_LIMIT - 1))
    others = Request(tokens(60, seed=1), (59,))
    alone = ort_session(folder).states([ids])[0]
    (folder / "config.json").unlink()
    assert apart(ort_session(folder).states([others, ids])[1], alone) <= NATS
    monkeypatch.setattr("qeval.backends.onnx.settings._constant", lambda value: math.inf)  # as where it is computed
    rope = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    for config in (
        {"rope_scaling": rope, "original_max_position_embeddings": ROPE_LIMIT},
        {"rope_scaling": rope | {"original_max_position_embeddings": ROPE_LIMIT}},
    ):
        (folder / "config.json").write_text(json.dumps(config))
        assert apart(ort_session(folder).states([others, ids])[1], alone) <= NATS
    (folder / "config.json").write_text("{}")
    assert apart(ort_session(folder).states([others, ids])[1], alone) > 0.01, "the test could tell"


def test_a_prefix_belongs_to_the_session_that_made_it(sessions):
    prefix = ort_session(float_folder("llama")).prefill(tokens(5))
    with torch.inference_mode(), torch_backend("llama").open(None) as other:
        for theirs in (prefix, other.prefill(tokens(5))):
            with pytest.raises(TypeError, match="belongs to the session that made it"):
                sessions["llama"].states([Request(tokens(3), (2,))], theirs)


def test_a_token_that_the_vocabulary_lacks_is_a_failure_that_is_told(sessions):
    for name in GRAPHS:
        with pytest.raises(QevalError, match=r"^ONNX Runtime failed in a forward pass: .*[^.]\.$"):
            sessions[name].states([Request((1, 5000), (1,))])


def test_no_states_have_no_logits(sessions):
    assert sessions["llama"].logits(torch.empty(0, 64)).shape == (0, 256)


class Graph:
    """A body that gives whatever it is told to, however many tokens come in."""

    def __init__(self, rows):
        self.rows = rows
        self.error = None

    def run(self, names):
        if self.error is not None:
            raise self.error
        count = np.array([self.rows])
        found = {COUNT: count} | {n: np.zeros((1, 2, 3, 4), np.float32) for n in names if n != COUNT}
        return [ort.OrtValue.ortvalue_from_numpy(found[name]) for name in names]


class GraphValues(DeviceValues):
    """The CPU's, with a session that needs no graph."""

    def run(self, session, outputs, feeds, on_host=()):
        return session.run(outputs)


def session_of(graph, pasts=()):
    decoder = Decoder("input_ids", None, None, pasts, 10, 4, b"", b"")
    return OrtSession(decoder, graph, graph, GraphValues(choose_provider("cpu")), max_length=9)


def test_fewer_positions_than_tokens_is_an_error():
    with pytest.raises(QevalError) as told:
        session_of(Graph(2)).states([Request((1, 2, 3), (0,)), Request((4,), (0,))])
    assert str(told.value) == "The graph gave states of 2 positions for 2 x 3 tokens; it can't be scored."


def test_a_forward_that_fails_is_told_in_a_line():
    graph = Graph(3)
    graph.error = RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : out of everything.\n  at stack\n  at stack"
    )
    with pytest.raises(QevalError) as told:
        session_of(graph).states([Request((1, 2, 3), (0,))])
    assert str(told.value) == "ONNX Runtime failed in a forward pass: out of everything."


@pytest.mark.parametrize(
    ("name", "sharing"), [("llama", "one"), ("gemma3", "one"), ("phi3", "one"), ("olmo2", "batch")]
)
def test_how_a_graph_continues_a_prefix_is_tried(sessions, name, sharing):
    assert sessions[name].sharing == sharing


def test_where_no_prefix_can_be_continued_it_is_run_again():
    session = ort_session(float_folder("olmo2"))
    prefix, requests = tokens(9), [Request(tokens(n, seed=n), (n - 1,)) for n in (3, 8)]
    expected = session.states(requests, session.prefill(prefix))
    session.sharing = "none"
    kept = session.prefill(prefix)
    assert (kept.length, kept.values) == (9, {})
    for one, other in zip(session.states(requests, kept), expected, strict=True):
        assert apart(one, other) <= NATS


def test_lengths_are_checked_before_anything_runs():
    graph = Graph(10)
    graph.error = AssertionError("it ran")
    session = session_of(graph, (PastInput("past", "present", 2, 4, np.float32),))
    session.sharing = "one"
    for asked in (lambda: session.prefill(range(10)), lambda: session.states([Request(tuple(range(10)), (0,))])):
        with pytest.raises(QevalError, match="A sequence of 10 tokens is longer than the context of 9"):
            asked()


@contextmanager
def changed(folder, tmp_path, **settings):
    """A copy of a folder with another genai_config.json."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "genai_config.json"
    content = json.loads(file.read_text())
    content["model"] |= settings
    file.write_text(json.dumps(content))
    yield copy


def test_the_context_is_the_folders(tmp_path):
    with changed(float_folder("llama"), tmp_path, context_length=20) as folder:
        assert ort_session(folder).max_length == 20


def test_a_folder_without_a_context_length_is_refused(tmp_path):
    with (
        changed(float_folder("llama"), tmp_path, context_length=None) as folder,
        pytest.raises(UsageError, match=r"genai_config\.json names no context length"),
        opened(folder, choose_provider("cpu"), threads=1),
    ):
        pass


def test_the_assignment_covers_body_and_head():
    with opened(float_folder("llama"), choose_provider("cpu"), threads=1) as found:
        counts = found.assignment.counts
    assert counts["CPUExecutionProvider", "MatMul"] == 15
    assert counts["CPUExecutionProvider", "GroupQueryAttention"] == 2
