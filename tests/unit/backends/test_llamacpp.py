"""Scoring by llama.cpp: sessions against transformers on the same file, and runs that lay it beside torch.

By llama.cpp itself where llama-cpp-python is installed, and everywhere by a stand-in that computes in torch.
"""

import os
from importlib import import_module

import pytest
import torch

from qeval.backends.llamacpp.backend import LlamaCppBackend
from qeval.backends.llamacpp.cache_types import CacheTypes, cache_types, rotations_as
from qeval.backends.llamacpp.library import version
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, UsageError
from qeval.quant.scheme import parse_parts, scheme_of
from qeval.quant.variant import Variant
from qeval.types import Request
from tests.fixtures.bench import CONTEXT, Bench, kl, records
from tests.fixtures.engines_llamacpp import STAND_IN, tiny
from tests.fixtures.ggufs import write_ggufs
from tests.fixtures.tiny import save_tiny

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


def types_of(*parts):
    return cache_types(scheme_of(parse_parts(parts)))


def test_ggmls_types_of_a_scheme_are_those_of_a_context():
    assert types_of("kv-q4_0") == CacheTypes("q4_0", "q4_0")
    assert types_of("k-q8_0", "v-q4_0").numbers == (8, 2)
    assert types_of("k-iq4_nl", "v-q5_1").numbers == (20, 7)  # ggml.h
    assert types_of("k-q8_0") == CacheTypes("q8_0", "f16") and not types_of("k-q8_0").needs_flash
    assert types_of("v-q8_0-hadamard") == CacheTypes("f16", "q8_0", rotates=True)
    assert types_of("v-q8_0").needs_flash
    assert types_of() == CacheTypes() and CacheTypes().numbers == (1, 1)


@pytest.mark.parametrize(
    "parts,says",
    [
        (("kv-int8",), "no type int8-token for keys or values; its types are q8_0, q5_0, q5_1, q4_0, q4_1, iq4_nl"),
        (("k-q8_0", "v-fp8-tensor"), "no type fp8-tensor"),
        (("a-int8-token",), "rounds activations in a way of its own"),
        (("k-q8_0-hadamard", "v-q8_0"), "rotates keys and values both, or neither"),
    ],
)
def test_what_llamacpp_has_not_is_named(parts, says):
    with pytest.raises(UsageError, match=says):
        types_of(*parts)


@pytest.mark.parametrize("before", [None, "0"])
def test_rotations_are_as_the_scheme_says_and_the_environment_stays(before, monkeypatch):
    name = "LLAMA_ATTN_ROT_DISABLE"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    for types, expected in ((CacheTypes("q8_0", "q8_0"), "1"), (CacheTypes("q8_0", "q8_0", rotates=True), "0")):
        with rotations_as(types):
            assert os.environ[name] == expected
        assert os.environ.get(name) == before


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A bench whose model has heads of 32 numbers, one of ggml's blocks each."""
    made = Bench(tmp_path_factory.mktemp("wide"))
    save_tiny(made.model, max_position_embeddings=CONTEXT, head_dim=32, dtype=torch.float32)
    return made


def test_keys_and_values_of_ggmls_types_are_scored_beside_torchs(library, wide, tmp_path):
    """Torch rounds them as the gguf package does; llama.cpp itself rounds queries too, to 8 bits."""
    made = getattr(import_module(STAND_IN), "MADE", [])
    made.clear()
    out = tmp_path / "out"
    methods = ("fp16+kv-q4_0", "fp16+k-q8_0", "fp16+k-q8_0+v-q4_0", "rtn:g32+kv-q8_0")
    flags = {"methods": ",".join(methods), "tasks": "kl", "window": "32", "stride": "32", "max_windows": "2"}
    assert wide.compare(*QUIET, "--backend", "torch,llama.cpp", **flags, out=str(out)) == 0
    for method in methods[:3]:
        assert kl(out, method) > 1e-7
        ours, theirs = kl(out, method), kl(out, f"{method}@llama.cpp")
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-9) if library < 1e-4 else ours / 5 < theirs < 5 * ours
    found = records(out)
    attention = {name: found[f"{name}@llama.cpp"]["runtime"]["facts"][1] for name in methods}
    assert "keys q4_0, values q4_0; flash attention, which quantized values need" in attention["fp16+kv-q4_0"]
    assert "keys q8_0, values f16; attention is not flash attention" in attention["fp16+k-q8_0"]
    assert "bits per cached token" in found["fp16+kv-q4_0@llama.cpp"]["details"]
    assert "16 x Q4_0" not in found["fp16+kv-q4_0@llama.cpp"]["runtime"]["facts"][0]
    if library < 1e-4:
        # floor, then the recipes: types, flash attention, rotation
        assert made == [
            ("F16", "F16", 0, False), ("Q4_0", "Q4_0", 1, False), ("Q8_0", "F16", 0, False),
            ("Q8_0", "Q4_0", 1, False), ("Q8_0", "Q8_0", 1, False),
        ]  # fmt: skip


def test_a_rotation_of_heads_that_llamacpp_does_not_rotate_is_refused_before_scoring(library, wide, tmp_path, capsys):
    flags = {"methods": "fp16+kv-q4_0-hadamard", "tasks": "kl", "out": str(tmp_path / "out")}
    assert wide.compare(*QUIET, "--backend", "llama.cpp", **flags) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp rotates heads that 64 divides, and this model's have 32; leave -hadamard out" in error


def test_the_key_of_rows_names_types_that_are_not_the_default(library):
    ours = backend()
    assert ours.identity(None)["backend"] | {"runtime": ""} == {
        "runtime": "", "provider": "CPU", "cache": "fp16", "flash": False,
    }  # fmt: skip
    variant = Variant("key", {}, {}, {}, (), scheme=scheme_of(parse_parts(["kv-q8_0"])))
    found = ours.identity(variant)["backend"]
    assert (found["cache"], found["flash"]) == ("keys q8_0, values q8_0", True)


@pytest.fixture(scope="module")
def wide_ggufs(tmp_path_factory):
    settings = {"hidden_size": 128, "max_position_embeddings": CONTEXT}  # heads of 32 numbers
    return write_ggufs(tmp_path_factory.mktemp("wide"), "f32", "q8", **settings)


WINDOWS = {"tasks": "kl", "window": "32", "stride": "32", "max_windows": "2", "methods": None}


def test_a_gguf_file_has_the_keys_and_values_of_a_flag(library, bench, wide_ggufs, tmp_path):
    made = getattr(import_module(STAND_IN), "MADE", [])
    made.clear()
    out = tmp_path / "out"
    given = ("--variant", f"q8={wide_ggufs['q8']}", "--backend", "torch,llama.cpp", "--kv-types", "q8_0,q4_0")
    flags = WINDOWS | {"model": str(wide_ggufs["f32"]), "out": str(out)}
    assert bench.compare(*QUIET, *given, **flags) == 0
    found = records(out)
    names = ["q8", "q8@llama.cpp", "q8@weights", "q8@weights@llama.cpp"]
    assert list(found) == ["baseline@llama.cpp", *names]
    assert kl(out, "q8") > 2 * kl(out, "q8@weights")
    for name in ("q8", "q8@llama.cpp"):
        details = found[name]["details"]
        assert details["keys"].startswith("q8_0") and details["values"].startswith("q4_0")
        assert details["scored"] == "as a whole: weights and keys and values"
        assert "bits per cached token" in details
    assert "keys" not in found["q8@weights"]["details"]
    assert "keys q8_0, values q4_0; flash attention" in found["q8@llama.cpp"]["runtime"]["facts"][1]
    assert "keys and values are fp16" in found["q8@weights@llama.cpp"]["runtime"]["facts"][1]
    if library < 1e-4:
        assert kl(out, "q8@llama.cpp") == pytest.approx(kl(out, "q8"), rel=1e-2)
        assert made == [("F16", "F16", 0, False), ("Q8_0", "Q4_0", 1, False), ("F16", "F16", 0, False)]


REFUSED_TYPES = {
    "no GGUF file": ((), "q8_0", "--kv-types is of GGUF files by --variant"),
    "three": (("q8",), "q8_0,q8_0,q8_0", "takes one type, or those of keys and of values"),
    "not ggml's": (("q8",), "int8", "--kv-types int8 is of llama.cpp's types, and it has no type int8-token"),
    "a head too small": (("q8",), "q8_0", "with --kv-types: q8_0 has blocks of 32"),
}


@pytest.mark.parametrize("files,types,says", REFUSED_TYPES.values(), ids=REFUSED_TYPES)
def test_other_types_of_a_gguf_file_are_refused(bench, ggufs, tmp_path, files, types, says, capsys):
    given = [word for name in files for word in ("--variant", f"{name}={ggufs[name]}")]
    flags = WINDOWS | {
        "model": str(ggufs["f32"]),
        "out": str(tmp_path / "out"),
        "methods": None if files else "rtn:g32",
    }
    assert bench.compare(*QUIET, *given, "--kv-types", types, **flags) == 2
    assert says in " ".join(capsys.readouterr().err.split())
