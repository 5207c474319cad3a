"""`qeval compare` with ONNX Runtime, through the command line: what is scored and kept, which backends are refused."""

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

import onnx_ir as ir

from qeval.backends.onnx import packages
from qeval.backends.onnx.backend import FolderBackend, OrtBackend
from qeval.backends.torch import TorchBackend
from qeval.cli.app import run_program
from qeval.compare.onnx import check_accuracy_levels
from qeval.compare.settings import BackendChoice
from qeval.errors import UsageError
from qeval.store.rows import RowStore
from tests.fixtures.bench import CONTEXT, Bench, records, refusing
from tests.fixtures.hub import COMMIT, FakeHub, reached
from tests.fixtures.onnx import SPECIAL
from tests.fixtures.tiny import save_tiny

BOTH = ("--backend", "torch,ort", "--accuracy-level", "1,4", "--quiet")
METHODS = "rtn:g32,awq:g32"
ORDER = [
    "baseline@ort",
    *(name + where for name in METHODS.split(",") for where in ("", "@ort", "@ort-acc4")),
    "theirs",
]
TWINS = {name: name.partition("@")[0] for name in ORDER if "@" in name}


def build_int4(model, out):
    """The folder that the model builder makes on its own terms: its own int4, its own accuracy level."""
    command = ["-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out), "-p", "int4", "-e", "cpu"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench on which everything was compared, a folder of the builder's too. Tests only read it."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        save_tiny(bench.model, max_position_embeddings=CONTEXT, **SPECIAL)
        build_int4(bench.model, folder / "int4")
        assert bench.compare(*BOTH, "--variant", f"theirs={folder / 'int4'}", methods=METHODS) == 0
    return bench


@pytest.fixture(autouse=True)
def home(place, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))


@pytest.fixture
def opened(monkeypatch):
    """The models that were opened to compute with."""
    found = []
    for kind in (TorchBackend, OrtBackend, FolderBackend):

        def spy(self, target, original=kind.open):
            found.append((self.name, target and target.folder.name))
            return original(self, target)

        monkeypatch.setattr(kind, "open", spy)
    return found


def rows(out, kind, variant):
    found = [row for row in RowStore(out).read(kind).to_pylist() if row["variant"] == variant]
    return sorted(found, key=lambda row: tuple(row.get(name, 0) for name in ("subject", "item", "window", "position")))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_a_model_inside_a_hub_repository_is_scored_as_its_local_copy(place, tmp_path, monkeypatch):
    """In a folder as Microsoft keeps them, and as transformers.js does: graphs in one, the rest in the root."""
    local = {path.name: path.read_bytes() for path in (place.folder / "int4").iterdir()}
    files = {f"cpu/int4/{name}": data for name, data in local.items()} | {"onnx/model_q4.onnx": b"-"}
    files |= {f"onnx/{name}" if "onnx" in name else name: data for name, data in local.items() if "genai" not in name}
    files["config.json"] = (place.model / "config.json").read_bytes()
    given = {"cpu": "cpu/int4", "js": "onnx/model.onnx"}
    flags = [f"--variant={name}=org/onnx:{what}" for name, what in given.items()]
    with reached(FakeHub({"org/onnx": files}), monkeypatch, tmp_path / "cache"):
        assert place.compare("--quiet", *flags, methods=None, tasks="kl,ppl", out=str(tmp_path / "out")) == 0
    found = records(tmp_path / "out")
    assert found["cpu"]["details"]["from"] == f"cpu/int4 of org/onnx at commit {COMMIT}"
    assert found["js"]["details"]["from"] == f"onnx/model.onnx of org/onnx at commit {COMMIT}"
    for name in given:
        ours, theirs = rows(tmp_path / "out", "tokens", name), rows(place.out, "tokens", "theirs")
        assert [row | {"variant": ""} for row in ours] == [row | {"variant": ""} for row in theirs]


def test_every_model_has_its_record(place):
    found = records(place.out)
    assert list(found) == ORDER
    assert {each["status"] for each in found.values()} == {"done"}
    assert {name: each["backend"] for name, each in found.items()} == {
        name: "ort" if name == "theirs" else name.partition("@")[2] or "torch" for name in ORDER
    }
    assert {name for name, each in found.items() if each["role"] == "floor"} == {"baseline@ort"}
    assert {name: each["twin"] for name, each in found.items() if each["twin"]} == TWINS


def test_the_runtime_is_told(place):
    found = {name: each["runtime"] for name, each in records(place.out).items()}
    assert {name for name, runtime in found.items() if runtime is None} == set(METHODS.split(","))
    assert found["rtn:g32@ort"]["accuracy_level"] == 1
    assert found["rtn:g32@ort-acc4"]["accuracy_level"] == 4
    assert (found["baseline@ort"]["accuracy_level"], found["theirs"]["accuracy_level"]) == (None, None)
    assert found["theirs"]["exporter"] is None
    for name in set(found) - set(METHODS.split(",")):
        assert set(found[name]["nodes"]) == {"CPUExecutionProvider"}
        assert found[name]["provider"] == "CPUExecutionProvider"
        assert found[name]["runtime"].startswith("onnxruntime")
    assert all(found[name]["exporter"] == "genai" for name in TWINS)
    assert any("accuracy level 4 (activations in int8)" in fact for fact in found["rtn:g32@ort-acc4"]["facts"])
    assert any("4 bits" in fact and "accuracy level 4" in fact for fact in found["theirs"]["facts"])


def test_the_kernels_share_is_told_where_there_is_a_twin(place):
    for name in ORDER:
        found = [row["kernel_kl_nats"] for row in rows(place.out, "tokens", name)]
        assert len(found) == 4 * 64
        if name not in TWINS:
            assert set(found) == {None}
        elif name.endswith("-acc4"):
            assert 1e-6 < mean(found) < 0.1
        else:
            assert abs(mean(found)) <= 1e-8


def test_the_whole_loss_is_the_quantizers_where_the_kernel_adds_none(place):
    for method in METHODS.split(","):
        ours, theirs = (rows(place.out, "tokens", method + where) for where in ("", "@ort"))
        for one, other in zip(ours, theirs, strict=True):
            assert (one["window"], one["position"]) == (other["window"], other["position"])
            assert other["kl_nats"] == pytest.approx(one["kl_nats"], abs=1e-5)
            assert (one["nll"] is None) == (other["nll"] is None)
            assert one["nll"] is None or other["nll"] == pytest.approx(one["nll"], abs=1e-4)
    floor = mean(row["kl_nats"] for row in rows(place.out, "tokens", "baseline@ort"))
    quantized = mean(row["kl_nats"] for row in rows(place.out, "tokens", "rtn:g32@ort"))
    assert abs(floor) < 1e-6
    assert quantized > 1e-3


def test_questions_are_answered_alike(place):
    for method in METHODS.split(","):
        ours, theirs = (rows(place.out, "items", method + where) for where in ("", "@ort"))
        assert len(ours) == 8
        assert [row["item"] for row in ours] == [row["item"] for row in theirs]
        assert [row["pred"] for row in ours] == [row["pred"] for row in theirs]
        assert {row["backend"] for row in theirs} == {"ort"}


def test_a_folder_made_elsewhere_is_scored_and_described(place):
    found = records(place.out)["theirs"]
    assert found["method"] == "onnx"
    assert "int4-g32" in found["grid"]
    assert 4 < found["bits_per_weight"] < 6
    assert found["quantized_weights"] > 0
    assert found["details"]["made by"].startswith("onnxruntime-genai")
    assert found["details"]["compared"] == "12 of its 12 matrices with the baseline's weights"
    kl = mean(row["kl_nats"] for row in rows(place.out, "tokens", "theirs"))
    assert 1e-3 < kl < 1
    assert len(rows(place.out, "items", "theirs")) == 8


def test_a_second_run_scores_nothing_and_keeps_the_runtime(place, opened):
    before = records(place.out)
    assert place.compare(*BOTH, "--variant", f"theirs={place.folder / 'int4'}", methods=METHODS) == 0
    assert opened == []
    after = records(place.out)
    assert {name: each["runtime"] for name, each in after.items()} == {
        name: each["runtime"] for name, each in before.items()
    }
    assert not (place.out / "states").exists()


def test_ort_alone_has_the_plain_names(place, tmp_path, opened):
    out = tmp_path / "out"
    assert place.compare("--backend", "ort", "--quiet", methods="rtn:g32", out=str(out)) == 0
    found = records(out)
    assert list(found) == ["baseline@ort", "rtn:g32"]
    assert found["rtn:g32"]["backend"] == "ort"
    assert found["rtn:g32"]["twin"] is None
    assert {row["kernel_kl_nats"] for row in rows(out, "tokens", "rtn:g32")} == {None}
    together = rows(place.out, "tokens", "rtn:g32@ort")
    alone = rows(out, "tokens", "rtn:g32")
    assert [row["kl_nats"] for row in alone] == pytest.approx([row["kl_nats"] for row in together], abs=1e-9)
    assert [name for name, key in opened if name == "torch" and key is not None] == []


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place.folder / "int4", tmp_path / "copy")


@pytest.mark.parametrize("changed", ["data", "config"])
def test_a_folder_made_elsewhere_is_scored_anew_when_it_changed(place, copy, tmp_path, opened, changed):
    """Wherever its weights lie, and though its configuration alone changed: it says how the session multiplies."""
    model = ir.load(copy / "model.onnx")
    ir.save(model, copy / "model.onnx", external_data="weights.bin")
    arguments = ("--variant", f"theirs={copy}", "--quiet")
    flags = {"methods": None, "tasks": "kl", "out": str(tmp_path / "out")}
    assert place.compare(*arguments, **flags) == place.compare(*arguments, **flags) == 0
    assert opened.count(("ort", copy.name)) == 1
    if changed == "data":
        data = bytearray((copy / "weights.bin").read_bytes())
        start = ir.load(copy / "model.onnx").graph.initializers["lm_head.MatMul.weight_Q4"].const_value.offset
        data[start : start + 20] = bytes(byte ^ 1 for byte in data[start : start + 20])
        (copy / "weights.bin").write_bytes(data)
    else:
        config = json.loads((copy / "genai_config.json").read_text())
        config["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"] = "1"
        (copy / "genai_config.json").write_text(json.dumps(config))
    assert place.compare(*arguments, **flags) == 0
    assert opened.count(("ort", copy.name)) == 2


@pytest.fixture
def refused(place, tmp_path, capfd):
    """Runs `compare`, which must refuse; returns the sentence."""
    return refusing(place, tmp_path / "out", capfd)


@pytest.mark.parametrize("ep", ["cuda", "tensorrt"])
def test_level_4_is_refused_where_no_kernel_rounds_activations(ep):
    with pytest.raises(UsageError, match=rf"ONNX Runtime's CPU kernels; those of {ep} compute with them as they are"):
        check_accuracy_levels(BackendChoice(("torch", "ort"), ep=ep, accuracy_levels=(1, 4)))
    check_accuracy_levels(BackendChoice(("torch", "ort"), ep=ep))
    check_accuracy_levels(BackendChoice(("torch", "ort"), ep="cpu", accuracy_levels=(4,)))


@pytest.mark.parametrize("what", ["ours", "theirs"])
def test_an_unknown_provider_is_refused(refused, place, what):
    more = ("--backend", "ort") if what == "ours" else ("--variant", f"theirs={place.folder / 'int4'}")
    told = refused(*more, "--ep", "cdua")
    assert told.startswith("Unknown execution provider 'cdua'; nearest: cuda, cpu. Choices: auto, cpu, cuda, dml,")


@pytest.mark.skipif("CUDAExecutionProvider" in packages.import_runtime().get_available_providers(), reason="has CUDA")
@pytest.mark.parametrize("what", ["ours", "theirs"])
def test_a_provider_that_is_not_installed_is_refused(refused, place, what):
    more = ("--backend", "ort") if what == "ours" else ("--variant", f"theirs={place.folder / 'int4'}")
    told = refused(*more, "--ep", "cuda", late=what == "theirs")
    assert "CUDAExecutionProvider" in told
    assert "pip install 'qeval[cuda]'" in told


def test_a_block_that_no_kernel_takes_is_named_before_any_export(refused):
    told = refused("--backend", "torch,ort", methods="rtn:g32,rtn:g24")
    assert "'rtn:g24': ONNX Runtime has no kernel for blocks of 24 (model.layers.0." in told
    assert told.endswith("choose a group size such as 32 or 128, or --backend torch.")


@pytest.mark.parametrize("what", ["ours", "theirs"])
def test_missing_packages_are_named(refused, place, what, monkeypatch):
    monkeypatch.setattr(packages.metadata, "packages_distributions", lambda: {})
    more = ("--backend", "ort") if what == "ours" else ("--variant", f"theirs={place.folder / 'int4'}")
    told = refused(*more)
    assert told.startswith("The ONNX Runtime backend needs onnxruntime, which isn't installed: pip install 'qeval[")


def test_two_runtimes_in_one_environment_are_named(refused, monkeypatch):
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    monkeypatch.setattr(packages.metadata, "packages_distributions", lambda: both)
    told = refused("--backend", "ort")
    assert told.startswith("onnxruntime and onnxruntime-gpu are installed side by side and own the same folder")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--backend", "onnx"), "Unknown backend 'onnx'"),
        (
            ("--backend", "ort", "--exporter", "optimum"),
            "Invalid value for '--exporter': Value error, 'optimum' is not one of 'auto', 'genai'",
        ),
        (
            ("--backend", "ort", "--format", "qdd"),
            "Invalid value for '--format': Value error, 'qdd' is not one of 'nbits', 'qdq'.",
        ),
        (("--backend", "ort", "--accuracy-level", "2"), "--accuracy-level takes 1 (fp32 activations), 4 (int8"),
    ],
)
def test_words_that_no_backend_has_are_refused(refused, flags, sentence):
    assert sentence in refused(*flags)


def test_torch_comes_first_in_whatever_order_the_backends_are_named(place, tmp_path):
    assert place.compare("--backend", "ort,torch", "--quiet", methods="rtn:g32", out=str(tmp_path / "out")) == 0
    found = records(tmp_path / "out")
    assert list(found) == ["baseline@ort", "rtn:g32", "rtn:g32@ort"]
    assert found["rtn:g32@ort"]["twin"] == "rtn:g32"


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("rtn:g24", "ONNX Runtime has no kernel for blocks of 24"),
        ("nvfp4", "ONNX Runtime's MatMulNBits multiplies by integers of 4 or 8 bits, not by nvfp4 (model.layers.0."),
    ],
)
def test_a_variant_made_before_that_no_kernel_takes_is_named_at_once(refused, place, tmp_path, method, sentence):
    model, made = str(place.model), str(tmp_path / "made")
    assert (
        run_program(["quantize", "--model", model, "--method", method, "--out", made, "--quiet", "--device", "cpu"])
        == 0
    )
    told = refused("--backend", "ort", "--variant", f"mine={made}", methods=None)
    assert sentence in told


def test_floats_are_not_exported(place, tmp_path, capfd):
    out = tmp_path / "out"
    assert (
        run_program(["export", "--model", str(place.model), "--method", "mxfp4-rceil", "--out", str(out), "--quiet"])
        == 2
    )
    assert "'mxfp4-rceil': ONNX Runtime's MatMulNBits multiplies by integers" in capfd.readouterr().err
    assert not out.exists()
