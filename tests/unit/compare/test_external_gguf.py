"""`--variant NAME=FILE.gguf`: read by its types through `compare`, and refused with its cause."""

import gguf
import pytest

from tests.fixtures.bench import Bench, kl, records
from tests.fixtures.ggufs import write_gguf, write_ggufs
from tests.fixtures.tiny import tiny_llama

QUIET = ("--quiet", "--tasks", "kl,ppl")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A corpus; the models are the files."""
    return Bench(tmp_path_factory.mktemp("elsewhere-gguf"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    """A tiny Llama as GGUF files of several types."""
    return write_ggufs(tmp_path_factory.mktemp("ggufs"), "f32", "q8", "q4")


def test_gguf_files_are_read_by_their_types(bench, ggufs, tmp_path):
    out = tmp_path / "out"
    given = [flag for name in ("f32", "q8", "q4") for flag in ("--variant", f"{name}={ggufs[name]}")]
    assert bench.compare(*QUIET, *given, methods=None, model=str(ggufs["f32"]), out=str(out)) == 0
    found = records(out)
    assert (found["q8"]["method"], found["q8"]["grid"], found["q8"]["bits_per_weight"]) == ("gguf", "Q8_0", 8.5)
    assert (found["q4"]["grid"], found["q4"]["bits_per_weight"]) == ("Q4_0", 4.5)
    assert kl(out, "f32") == 0
    assert 0 < kl(out, "q8") < 0.01 < kl(out, "q4")


def test_a_file_of_the_baseline_itself_loses_nothing_and_has_its_report(bench, ggufs, tmp_path):
    out = tmp_path / "out"
    given = ("--variant", f"same={ggufs['q4']}")
    assert bench.compare(*QUIET, *given, methods=None, model=str(ggufs["q4"]), out=str(out)) == 0
    assert kl(out, "same") == 0
    assert records(out)["same"]["grid"] == "Q4_0"
    assert (out / "report.html").exists()


def test_a_gguf_of_rows_in_the_other_rotary_order_is_named(bench, ggufs, tmp_path, capsys):
    """What a converter that forgets llama.cpp's order of q and k writes."""
    model = tiny_llama(seed=5, intermediate_size=128, vocab_size=258)
    path = write_gguf(tmp_path / "m.gguf", model, quantize=gguf.GGMLQuantizationType.Q8_0, permute=False)
    assert bench.compare(*QUIET, "--variant", f"theirs={path}", methods=None, model=str(ggufs["f32"])) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "q_proj.weight is not the baseline's" in told
    assert "its rows are in the other order of rotary positions" in told


def test_a_gguf_type_that_nothing_dequantizes_is_named(bench, ggufs, capsys, monkeypatch):
    def unknown(data, kind):
        raise NotImplementedError(kind)

    monkeypatch.setattr(gguf, "dequantize", unknown)
    flags = ("--variant", f"theirs={ggufs['q4']}")
    assert bench.compare(*QUIET, *flags, methods=None, model=str(ggufs["f32"])) == 2
    assert "which the gguf package can't dequantize; quantize it otherwise." in " ".join(
        capsys.readouterr().err.split()
    )
