"""The engines of ONNX folders beyond the contract: a variant's integers, transformers' own tokens, and failures."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

import numpy as np
import torch

from qeval.backends.onnx.files import GENAI_CONFIG
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.serving import _WIDTH, read_served
from qeval.backends.torch import TorchSession
from qeval.bench.engines import onnx_folder
from qeval.bench.engines.base import greedy
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.genai import GenaiEngine
from qeval.bench.engines.onnxruntime import OrtEngine
from qeval.bench.engines.registry import open_engine, prepare_engine
from qeval.errors import QevalError, UsageError
from qeval.models.source import resolve
from qeval.store.variants import Origin, save_variant
from tests.fixtures.engines import prompts, slow_greedy, slow_logits
from tests.fixtures.onnx import ROPE_LIMIT, checkpoint, float_folder, loaded, made, shared_home, torch_backend

BOTH = {"onnxruntime": OrtEngine, "onnxruntime-genai": GenaiEngine}
LAST = 255
"""The vocabulary's last id."""


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(shared_home()))


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants") / "rtn"
    origin = Origin(recipe={"method": "rtn"}, model={"name": "llama"}, calibration=None, float_bits=32, seconds=0.0)
    save_variant(made("llama", "rtn:g32"), folder, origin)
    return folder


@pytest.fixture(scope="module")
def engines():
    opened = {name: engine(float_folder("llama")) for name, engine in BOTH.items()}
    yield opened
    for engine in opened.values():
        engine.close()


def spec(variant, **changed):
    return replace(EngineSpec(resolve(str(checkpoint("llama"))), variant, accuracy_level=1), **changed)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_variant_goes_on_as_its_fake_quantized_twin(name, batch, variant):
    asked = spec(variant)
    engine = open_engine(name, asked, prepare_engine(name, asked))
    given = prompts(batch, 8, LAST)
    with torch.inference_mode(), torch_backend("llama").open(made("llama", "rtn:g32")) as session:
        assert greedy(engine, given, 8) == slow_greedy(session, given, 8)
    engine.close()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_float_model_goes_on_as_transformers_generate(name, batch, engines):
    given = prompts(batch, 9, LAST, seed=4)
    model = loaded("llama").model
    found = model.generate(
        torch.from_numpy(given), attention_mask=torch.ones(given.shape, dtype=torch.long),
        do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert greedy(engines[name], given, 10) == found[:, 9:].tolist()


def test_the_identity_is_read_from_the_graph(variant):
    rounded = spec(variant, accuracy_level=4, threads=2)
    place = prepare_engine("onnxruntime", rounded)
    assert place == prepare_engine("onnxruntime-genai", rounded), "one folder serves both"
    assert place != prepare_engine("onnxruntime", spec(variant))
    for name in BOTH:
        told = open_engine(name, rounded, place).identity
        assert told.engine == name
        assert (told.provider, told.dtype, told.threads) == ("CPUExecutionProvider", "fp32", 2)
        assert "MatMulNBits: 4 bits, blocks of 32, symmetric, accuracy level 4" in told.weights
        assert "1 x MatMul: fp32" in told.weights
        assert "onnxruntime 1." in told.version


def test_a_folder_of_someone_elses_is_run_as_it_is(tmp_path):
    theirs = float_folder("llama")
    assert prepare_engine("onnxruntime-genai", spec(theirs)) == theirs
    with pytest.raises(UsageError, match=f"has no {GENAI_CONFIG}"):
        prepare_engine("onnxruntime-genai", spec(float_folder("olmo2")))
    with pytest.raises(UsageError, match=f"has no {GENAI_CONFIG}"):
        GenaiEngine(float_folder("olmo2"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match="is no folder"):
        prepare_engine("onnxruntime", spec(tmp_path / "model.gguf"))


def test_a_graph_that_gives_the_last_position_already_is_served_as_it_is(tmp_path, engines):
    served = read_served(inspect_folder(float_folder("llama"), needs_tokenizer=False))
    folder = shutil.copytree(float_folder("llama"), tmp_path / "folder")
    (folder / "model.onnx").write_bytes(served.graph)
    again = read_served(inspect_folder(folder, needs_tokenizer=False)).graph
    assert again.count(_WIDTH.encode()) == served.graph.count(_WIDTH.encode()) > 0, "one Gather, not two"
    given = prompts(2, 7, LAST)
    assert greedy(OrtEngine(folder), given, 5) == greedy(engines["onnxruntime"], given, 5)


def test_generation_crosses_longropes_limit(engines):
    """Before it keys are turned by one set of frequencies, beyond it all of them by another."""
    engine, given = OrtEngine(float_folder("phi3")), prompts(2, ROPE_LIMIT - 3, LAST)
    assert greedy(engine, given, 8) == slow_greedy(TorchSession(loaded("phi3").model), given, 8)


@pytest.mark.parametrize("name", BOTH)
def test_sequences_may_fill_the_whole_context(name, engines):
    engine, given = engines[name], prompts(1, 254, LAST)
    engine.reset(1, 256)
    chosen = engine.prefill(given)
    engine.step(engine.step(chosen))
    with pytest.raises(QevalError, match="room was made for"):
        engine.step(chosen)


def test_genai_goes_on_after_what_it_takes_for_the_end_of_a_sequence(engines):
    engine, session = engines["onnxruntime-genai"], TorchSession(loaded("llama").model)
    given = prompts(2, 6, LAST)
    engine.reset(1, 16)
    engine.prefill(given[:1])
    engine.step(np.array([LAST]))
    chosen = engine.step(np.array([7]))
    expected = slow_logits(session, [*given[0].tolist(), LAST, 7])
    np.testing.assert_allclose(engine.logits()[0], expected, rtol=0, atol=1e-4 * abs(expected).max())
    assert chosen[0] == expected.argmax()


@pytest.mark.parametrize("listed", [False, True])
def test_genai_goes_on_after_the_folders_own_end_of_sequence(listed, engines, tmp_path):
    """Whether the folder names one id or several: a sequence that stopped there would be padded from there on."""
    given = prompts(2, 6, LAST)
    expected = greedy(engines["onnxruntime-genai"], given, 8)
    folder = shutil.copytree(float_folder("llama"), tmp_path / "folder")
    config = json.loads((folder / GENAI_CONFIG).read_text())
    ends = [expected[0][2], expected[1][4]]
    config["model"]["eos_token_id"] = ends if listed else ends[0]
    (folder / GENAI_CONFIG).write_text(json.dumps(config))
    assert greedy(GenaiEngine(folder), given, 8) == expected


def test_genai_refuses_what_it_would_get_wrong(engines):
    engine, given = engines["onnxruntime-genai"], prompts(2, 6, LAST)
    engine.reset(2, 16)
    engine.prefill(given)
    with pytest.raises(QevalError, match="can't go on after token 255"):
        engine.step(np.array([3, LAST]))
    given[1, -1] = LAST
    engine.reset(2, 16)
    with pytest.raises(UsageError, match="ends in token 255"):
        engine.prefill(given)


@pytest.mark.parametrize("name", BOTH)
def test_weights_and_caches_are_told_in_bytes(name, engines):
    """Two layers of two heads of 16 in fp32, keys and values, for each of the tokens that there is room for."""
    engine = engines[name]
    engine.reset(3, 20)
    engine.prefill(prompts(3, 8, LAST))
    told = engine.memory()
    folder = float_folder("llama")
    assert told.disk_bytes == sum((folder / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    parameters = sum(parameter.numel() for parameter in loaded("llama").model.parameters())
    assert parameters * 4 <= told.weights_bytes <= told.disk_bytes
    assert told.cache_bytes in (3 * tokens * 2 * 2 * 2 * 16 * 4 for tokens in (20, 21))


def test_closing_lets_the_session_go():
    for engine in (OrtEngine(float_folder("llama")), GenaiEngine(float_folder("llama"))):
        engine.reset(1, 8)
        engine.prefill(prompts(1, 4, LAST))
        held = weakref.ref(engine._session if isinstance(engine, OrtEngine) else engine.model)
        engine.close()
        gc.collect()
        assert held() is None
        assert engine.memory().cache_bytes == 0


class Failing:
    """A session that raises in every run."""

    def __init__(self, words):
        self.words = words

    def run_with_iobinding(self, binding):
        raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {self.words}\n at a stack")


def test_memory_that_runs_out_is_told_apart_from_other_failures():
    engine = OrtEngine(float_folder("llama"))
    engine.reset(1, 8)
    engine._session = Failing("Failed to allocate memory for requested buffer of size 99.")
    with pytest.raises(MemoryError, match="requested buffer of size 99"):
        engine.prefill(prompts(1, 4, LAST))
    engine._session = Failing("a node is broken.")
    with pytest.raises(QevalError, match=r"^ONNX Runtime failed in a forward pass: a node is broken\.$"):
        engine.prefill(prompts(1, 4, LAST))


@pytest.mark.parametrize("name", BOTH)
def test_a_provider_that_is_not_there_is_one_sentence(name, variant):
    with pytest.raises(UsageError, match="execution provider 'gpu'"):
        prepare_engine(name, spec(variant, provider="gpu"))
    with pytest.raises(UsageError, match="has no DmlExecutionProvider"):
        prepare_engine(name, spec(variant, provider="dml"))
    with pytest.raises(QevalError):
        BOTH[name](float_folder("llama"), "dml")


def test_genai_running_elsewhere_than_asked_is_an_error(monkeypatch):
    monkeypatch.setattr("qeval.bench.engines.genai._PROVIDERS", {"cpu": "cuda"})
    with pytest.raises(QevalError):
        GenaiEngine(float_folder("llama"), "cpu")
    with pytest.raises(UsageError, match="has no provider tensorrt"):
        GenaiEngine(float_folder("llama"), "tensorrt")


def test_graphs_are_not_written_in_bf16(monkeypatch):
    monkeypatch.setattr(onnx_folder, "require_provider", lambda *_: None)
    with pytest.raises(UsageError, match="not in bf16"):
        prepare_engine("onnxruntime", spec(None, provider="cuda", precision="bf16"))


def test_what_is_measured_holds_no_torch():
    engines = "qeval.bench.engines.onnxruntime, qeval.bench.engines.genai, qeval.bench.engines.llamacpp"
    code = f"import sys, {engines}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
