"""`--variant NAME=ORG/REPO[@REVISION]`: a quantized checkpoint from the hub's stand-in, through `compare`."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from qeval.compare.external_paths import local_places
from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import parse_hub_name, resolve
from tests.fixtures import packers
from tests.fixtures.bench import CONTEXT, Bench
from tests.fixtures.hub import COMMIT, TAG, FakeHub, reached
from tests.fixtures.tiny import save_tiny

THEIRS = "org/theirs"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
QUIET = {"methods": None, "tasks": "kl,ppl"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("elsewhere-hub"))
    save_tiny(made.model, max_position_embeddings=CONTEXT, intermediate_size=128)
    return made


@pytest.fixture(scope="module")
def local(bench):
    parts = {name: packers.awq(weight) for name, weight in packers.quantized(bench.model, "int4-g16").items()}
    return packers.save_checkpoint(bench.model, bench.folder / "local", AWQ, parts)


@pytest.fixture
def hub(bench, local, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in local.iterdir()} | {"pytorch_model.bin": b"pickle"}
    codes = {"quantization": {"quant_algo": "W4A16_AWQ"}, "producer": {"name": "modelopt"}}
    own = {
        "config.json": (bench.model / "config.json").read_bytes(),
        "hf_quant_config.json": json.dumps(codes).encode(),
    }
    silent = files | own
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    fake = FakeHub(
        {THEIRS: files, "org/silent": silent, "org/gated": files, "org/pickled": pickled},
        gated=frozenset({"org/gated"}),
    )
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    with reached(fake, monkeypatch, tmp_path / "cache"):
        yield fake


def scored(out):
    (record,) = json.loads((out / "run.json").read_text())["variants"]
    return record


def test_a_checkpoint_on_the_hub_is_read_as_its_local_copy_and_fetched_once(bench, local, hub, tmp_path, capsys):
    spelled = f"theirs={THEIRS}@{TAG}"
    assert bench.compare("--variant", spelled, out=str(tmp_path / "hub"), **QUIET) == 0
    assert f"from {THEIRS} at commit {COMMIT}" in " ".join(capsys.readouterr().err.split())
    record = scored(tmp_path / "hub")
    assert record["details"]["from"] == f"{THEIRS} at commit {COMMIT}"
    files = [path for path in hub.requests if path.endswith((".safetensors", ".bin"))]
    assert {Path(path).name for path in files} == {"model.safetensors"}
    hub.requests.clear()
    given = ("--variant", f"theirs={local}", "--quiet")
    assert bench.compare(*given, out=str(tmp_path / "local"), **QUIET) == 0
    assert scored(tmp_path / "local")["key"] == record["key"] and not hub.requests
    (again,) = local_places([("theirs", Path(f"{THEIRS}@{TAG}"))])
    assert (again.path / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    assert not any(path.endswith(".safetensors") for path in hub.requests)


def test_a_hub_that_is_down_leaves_the_cached_copy_and_its_warning(bench, hub, monkeypatch, tmp_path):
    (place,) = local_places([("theirs", Path(THEIRS))])
    assert place.warnings == ()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    given = ("--variant", f"theirs={THEIRS}", "--quiet")
    assert bench.compare(*given, out=str(tmp_path / "out"), **QUIET) == 0
    (warning,) = json.loads((tmp_path / "out" / "run.json").read_text())["warnings"]
    assert f"The hub does not answer for '{THEIRS}'" in warning
    assert f"the cached copy of commit {COMMIT} is used" in warning


@pytest.mark.parametrize(
    ("spelled", "says"),
    [
        ("org/none", "--variant x=org/none is no path here, and on the hub: The hub has no model 'org/none'"),
        ("org/gated", "--variant x=org/gated is no path here, and on the hub: Access to 'org/gated' is restricted"),
        (f"{THEIRS}@v9", f"'{THEIRS}' has no revision 'v9'"),
        (f"{THEIRS}@", "names no revision after its @"),
        ("org/pickled", "'org/pickled' has its weights as pickles only"),
    ],
)
def test_what_the_hub_does_not_give_is_a_sentence(hub, spelled, says):
    with pytest.raises(UsageError) as error:
        local_places([("x", Path(spelled))])
    assert says in str(error.value)


def test_paths_come_before_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "theirs").mkdir(parents=True)
    (tmp_path / "org" / "theirs@v1").mkdir()
    for path in (THEIRS, "org/theirs@v1", "org/theirs.gguf", "theirs", "./org/none", "/org/none", "a/b/c", "x@v1"):
        assert parse_hub_name(path) is None
    assert parse_hub_name("org/theirs@refs/pr/1").revision == "refs/pr/1"


def test_a_baseline_on_the_hub_that_only_its_own_file_calls_quantized_is_refused(hub):
    with pytest.raises(UsageError, match="is quantized already"):
        load_model(resolve("org/silent"))
