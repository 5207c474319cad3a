"""Scoring by vLLM: sessions against torch, a run with a checkpoint, and every refusal, on a stand-in that is a thread.

On vLLM itself where QEVAL_VLLM_PYTHON names an interpreter that has it.
"""

import os
import sys

import pytest
import torch

from qeval.backends.torch import TorchSession
from qeval.backends.vllm.backend import VllmBackend, VllmOptions
from qeval.backends.vllm.process import vllm_version
from qeval.errors import QevalError, UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.types import Request
from tests.fixtures import packers
from tests.fixtures.bench import Bench, kl, records
from tests.fixtures.engines_vllm import MADE, stand_in_for_vllm
from tests.fixtures.formats import compressed
from tests.fixtures.tiny import save_tiny

QUIET = ("--quiet",)
PREFIX = tuple(range(3, 20))
REQUESTS = [Request(tuple(range(start, start + 9 + start // 20)), (2, 5, 8)) for start in (60, 80, 100)]
REAL = "QEVAL_VLLM_PYTHON"
"""The variable that names an interpreter with vLLM."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture
def stand_in(monkeypatch):
    MADE.clear()
    stand_in_for_vllm(monkeypatch)


@pytest.fixture(scope="module")
def loaded(bench):
    return load_model(resolve(str(bench.model), None), device="cpu", dtype=None)


def backend(loaded, ids=256, **options):
    return VllmBackend(loaded, ids, "cpu", VllmOptions(sys.executable, **options))


def test_logits_are_those_of_torch_with_a_prefix_and_without(stand_in, loaded):
    torch_session = TorchSession(loaded.model)
    with backend(loaded).open(None) as session:
        inner = session.prefill(PREFIX[9:], session.prefill(PREFIX[:9]))
        assert inner.length == len(PREFIX) and session.vocab_size == 256
        for prefix, before in ((None, ()), (inner, PREFIX)):
            for request, states in zip(REQUESTS, session.states(REQUESTS, prefix), strict=True):
                expected = torch_session.logits(torch_session.states([request.after(before)])[0])
                found = session.logits(states)
                assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)
        with pytest.raises(QevalError, match="513 tokens is longer than the context of 512"):
            session.states([Request((1,) * 513, (0,))])
    assert MADE[0]["max_model_len"] == 513 and MADE[0]["enable_prefix_caching"] is False


def test_fewer_ids_than_the_baselines_and_what_vllm_refuses_are_told(stand_in, loaded):
    says = "gives logits of 320 ids in vLLM, the baseline of 400"
    with pytest.raises(UsageError, match=says), backend(loaded, ids=400).open(None):
        pass
    says = "vLLM failed: ValueError: kv_cache_dtype fp3 is not known"
    with pytest.raises(QevalError, match=says), backend(loaded, kv_cache="fp3").open(None):
        pass


def test_options_are_passed_and_are_in_the_key(stand_in, loaded):
    plain, other = backend(loaded), backend(loaded, dtype="bfloat16", tensor_parallel=2, kv_cache="fp8")
    assert plain.identity(None) != other.identity(None)
    assert other.identity(None)["backend"] == {
        "runtime": "vllm 9.9", "device": "cpu", "dtype": "bfloat16", "tensor_parallel": 2, "cache": "fp8",
    }  # fmt: skip
    with other.open(None) as session:
        facts = other.describe(session, None).facts
    passed = {name: MADE[-1][name] for name in ("dtype", "tensor_parallel_size", "kv_cache_dtype")}
    assert passed == {"dtype": "bfloat16", "tensor_parallel_size": 2, "kv_cache_dtype": "fp8"}
    assert facts[0] == "Computed in bfloat16, each layer on 2 GPUs; keys and values fp8."


def checkpoint(bench, folder):
    """A compressed-tensors checkpoint of the bench's model, and beside it the float one that the stand-in runs."""
    weights = packers.quantized(bench.model, "int4-g16")
    parts = {name: packers.compressed(weight) for name, weight in weights.items()}
    values = {name: weight.dequantize() for name, weight in weights.items()}
    packers.save_checkpoint(bench.model, folder.with_name(f"{folder.name}-float"), None, {}, values)
    return packers.save_checkpoint(bench.model, folder, compressed(4, size=16), parts)


def test_a_run_lays_a_checkpoint_and_the_baseline_beside_torch(stand_in, bench, tmp_path):
    folder, out = checkpoint(bench, tmp_path / "q4"), tmp_path / "out"
    flags = {"methods": None, "variant": f"q4={folder}", "backend": "torch,vllm", "out": str(out), "max_windows": "2"}
    assert bench.compare(*QUIET, "--vllm-dtype", "float32", **flags) == 0
    found = {variant["name"]: variant for variant in bench.report(out)["variants"]}
    assert [*found] == ["baseline@vllm", "q4", "q4@vllm"]
    assert found["baseline@vllm"]["role"] == "floor" and kl(out, "baseline@vllm") < 1e-6
    assert kl(out, "q4@vllm") == pytest.approx(kl(out, "q4"), rel=1e-3) and kl(out, "q4") > 1e-4
    assert found["q4@vllm"]["metrics"]["kernel_kl_nats"]["value"] < 1e-6
    runtime = records(out)["q4@vllm"]["runtime"]
    assert (runtime["runtime"], runtime["provider"]) == ("vllm 9.9", "CPU")
    assert "vLLM scored them too" in (out / "report.html").read_text(encoding="utf-8")


def test_a_recipe_is_to_be_exported_first(stand_in, bench, capsys):
    assert bench.compare(*QUIET, backend="vllm", methods="rtn:g32") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--backend vllm runs checkpoints, and rtn:g32 is none: write it by `qeval export --to hf" in said


def test_flags_of_vllm_without_it_are_refused(bench, capsys):
    assert bench.compare(*QUIET, "--vllm-dtype", "float32", methods="rtn:g32") == 2
    assert "--vllm-... flags are for --backend vllm" in " ".join(capsys.readouterr().err.split())


def test_an_interpreter_without_vllm_and_none_at_all_are_told(bench, capsys):
    with pytest.raises(UsageError, match=r"needs vLLM, which .* does not have: pip install vllm"):
        vllm_version(sys.executable)
    with pytest.raises(UsageError, match="--vllm-python no/python is no interpreter of Python that runs"):
        vllm_version("no/python")


@pytest.mark.skipif(not os.environ.get(REAL), reason=f"{REAL} names no interpreter with vLLM")
def test_vllm_itself_gives_the_logits_of_torch(tmp_path):
    folder = save_tiny(tmp_path / "model", head_dim=64)  # its kernels take no heads of 16
    loaded = load_model(resolve(str(folder), None), device="cpu", dtype=None)
    torch_session = TorchSession(loaded.model)
    options = VllmOptions(os.environ[REAL], dtype="float32")
    with VllmBackend(loaded, 256, "cpu", options).open(None) as session:
        states = session.states(REQUESTS, session.prefill(PREFIX))
        for request, each in zip(REQUESTS, states, strict=True):
            expected = torch_session.logits(torch_session.states([request.after(PREFIX)])[0])
            assert torch.allclose(session.logits(each), expected, atol=1e-3)
