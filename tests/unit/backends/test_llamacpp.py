"""Scoring by llama.cpp: sessions against transformers on the same file, and runs that lay it beside torch.

By llama.cpp itself where llama-cpp-python is installed, and everywhere by a stand-in that computes in torch.
"""

import pytest
import torch

from qeval.backends.llamacpp.backend import LlamaCppBackend
from qeval.backends.llamacpp.library import version
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, UsageError
from qeval.types import Request
from tests.fixtures.bench import CONTEXT, Bench
from tests.fixtures.engines_llamacpp import STAND_IN, tiny
from tests.fixtures.ggufs import write_ggufs

QUIET = ("--quiet",)
PREFIX = tuple(range(3, 40))
REQUESTS = [Request(tuple(range(start, start + 9 + start)), (2, 5, 8)) for start in (60, 80, 100)]


@pytest.fixture(params=["stand-in", "llama.cpp"])
def library(request, monkeypatch):
    """The relative error to expect: keys and values are fp16 in llama.cpp."""
    if request.param == "llama.cpp":
        pytest.importorskip("llama_cpp")
        return 5e-3
    for module in ("library", "backend"):
        monkeypatch.setattr(f"qeval.backends.llamacpp.{module}.MODULE", STAND_IN)
    return 1e-5


def backend(ids=256):
    return LlamaCppBackend(tiny(), ids, threads=1, device="cpu")


def expected(request):
    session = TorchSession(tiny().model)
    return session.logits(session.states([request])[0])


def close(found, wanted, tolerance):
    return torch.allclose(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def test_logits_are_those_of_transformers_with_a_prefix_and_without(library):
    with backend().open(None) as session:
        outer = session.prefill(PREFIX[:20])
        inner = session.prefill(PREFIX[20:], outer)
        other = session.prefill(PREFIX[5:], outer)
        assert (outer.length, inner.length) == (20, len(PREFIX))
        for prefix, before in ((None, ()), (inner, PREFIX), (other, (*PREFIX[:20], *PREFIX[5:])), (inner, PREFIX)):
            found = session.states(REQUESTS, prefix)
            for request, states in zip(REQUESTS, found, strict=True):
                assert states.dtype == torch.float32
                assert close(session.logits(states), expected(request.after(before)), library)


def test_an_answer_is_the_same_whatever_was_asked_before(library):
    with backend().open(None) as session:
        prefix = session.prefill(PREFIX)
        first = session.states(REQUESTS[:1], prefix)[0]
        session.states(REQUESTS)  # another path, and longer
        session.states([Request(tuple(range(1, 200)), (198,))])
        assert torch.equal(session.states(REQUESTS[:1], prefix)[0], first)


def test_a_prefix_is_run_once(library, monkeypatch):
    if library > 1e-4:
        pytest.skip("the stand-in counts")
    with backend().open(None) as session:
        session.states(REQUESTS, session.prefill(PREFIX))
        assert session._context._handle.run == len(PREFIX) + sum(len(request.tokens) for request in REQUESTS)


def test_more_logits_than_are_held_at_once_come_in_parts(library, monkeypatch):
    monkeypatch.setattr("qeval.backends.llamacpp.library._MOST_LOGITS", 256 * 7)
    request = Request(tuple(range(1, 60)), tuple(range(1, 50, 2)))
    with backend().open(None) as session:
        assert close(session.states([request])[0], expected(request), library)


def test_what_is_too_long_is_refused(library):
    with backend().open(None) as session:
        long = (1,) * (session.max_length + 1)
        for ask in (lambda: session.prefill(long), lambda: session.states([Request(long, (0,))])):
            with pytest.raises(QevalError, match=f"{len(long)} tokens is longer than the context of"):
                ask()


def test_ids_beyond_the_baselines_are_left_out_and_fewer_are_refused(library):
    with backend(250).open(None) as session:
        assert session.vocab_size == session.states(REQUESTS[:1])[0].shape[1] == 250
    with pytest.raises(UsageError, match="logits of 256 ids, the baseline of 300"), backend(300).open(None):
        pass


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    return write_ggufs(tmp_path_factory.mktemp("ggufs"), "f32", "q8", max_position_embeddings=CONTEXT)


def test_a_run_lays_files_given_and_written_beside_torch(library, bench, ggufs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = ("--variant", f"q8={ggufs['q8']}", "--backend", "torch,llama.cpp")
    drift = ("--drift-prompts", "4", "--drift-prompt-tokens", "16", "--drift-tokens", "8")
    asked = {"methods": "rtn:g32", "model": str(ggufs["f32"]), "tasks": "kl,ppl,mmlu,drift", "out": str(out)}
    assert bench.compare(*QUIET, *given, *drift, **asked) == 0
    found = {variant["name"]: variant for variant in bench.report(out)["variants"]}
    assert [*found] == ["baseline@llama.cpp", "rtn:g32", "rtn:g32@llama.cpp", "q8", "q8@llama.cpp"]
    floor = found["baseline@llama.cpp"]
    assert floor["role"] == "floor" and floor["metrics"]["kl_nats"]["value"] < 1e-4
    for name in ("rtn:g32", "q8"):
        assert found[f"{name}@llama.cpp"]["twin"] == name
        here, there = found[name]["metrics"], found[f"{name}@llama.cpp"]["metrics"]
        assert there["kernel_kl_nats"]["value"] < 0.2 * here["kl_nats"]["value"] + 1e-3
        assert there["kl_nats"]["value"] == pytest.approx(here["kl_nats"]["value"], rel=0.2, abs=1e-3)
        assert there.keys() >= here.keys()
    assert found["q8@llama.cpp"]["runtime"]["exporter"] is None
    assert "computed" in found["q8"]["details"] and "computed" not in found["q8@llama.cpp"]["details"]
    assert "Q8_0" in found["q8@llama.cpp"]["runtime"]["facts"][0]
    assert "14 x Q4_0" in found["rtn:g32@llama.cpp"]["runtime"]["facts"][0]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "llama.cpp scored them too" in page and ">llama.cpp</h2>" in page


def test_other_families_have_their_own_files_alone(library, bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("qeval.backends.llamacpp.gguf_writer._FAMILY", ())
    assert bench.compare(*QUIET, "--backend", "llama.cpp", out=str(tmp_path / "out")) == 2
    assert "--backend llama.cpp: qeval writes GGUF files of the Llama family" in " ".join(
        capsys.readouterr().err.split()
    )


def test_without_the_package_the_sentence_says_what_installs_it(bench, monkeypatch, capsys):
    monkeypatch.setattr("qeval.backends.llamacpp.backend.MODULE", "no_such_llama_cpp")
    assert bench.compare(*QUIET, "--backend", "llama.cpp") == 2
    assert "pip install 'qeval[llamacpp]'" in capsys.readouterr().err


def test_a_package_without_its_libraries_is_told(monkeypatch, tmp_path):
    (tmp_path / "half_llama_cpp.py").write_text("raise FileNotFoundError('Shared library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("qeval.backends.llamacpp.library.MODULE", "half_llama_cpp")
    with pytest.raises(UsageError, match=r"can't be loaded .*library not found.*install it anew: pip"):
        version()


def test_a_streamed_model_has_no_file(bench, capsys):
    assert bench.compare(*QUIET, "--backend", "llama.cpp", "--stream") == 2
    assert "--stream runs in torch" in capsys.readouterr().err
