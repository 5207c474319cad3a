"""Parts of hub repositories, `ORG/REPO[@REVISION]:WHAT`: GGUF files, and what lies in folders of theirs."""

import json
from pathlib import Path

import gguf
import pytest
from huggingface_hub import constants

from qeval.cli.app import run_program
from qeval.compare.external_paths import local_places
from qeval.errors import UsageError
from qeval.models.hub import fetch as fetch_module
from qeval.models.load import checkpoint_of
from qeval.models.source import resolve
from tests.fixtures.bench import CONTEXT, Bench
from tests.fixtures.ggufs import write_gguf
from tests.fixtures.hub import COMMIT, TAG, FakeHub, reached
from tests.fixtures.tiny import tiny_llama

GGUFS, MIXED, ONNX, ONE = "org/m-GGUF", "org/mixed", "org/m-onnx", "org/one"
KINDS = {"F32": None, "Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0}
FOLDER = {name: name.encode() for name in ("genai_config.json", "m.onnx", "m.onnx.data", "tokenizer.json", "own.py")}
QUIET = {"methods": None, "tasks": "kl,ppl", "max_windows": "1"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("hub-parts"))


@pytest.fixture(scope="module")
def files(bench):
    """A tiny model in three GGUF files."""
    model = tiny_llama(seed=5, intermediate_size=128, vocab_size=258, max_position_embeddings=CONTEXT)
    paths = {kind: write_gguf(bench.folder / f"m-{kind}.gguf", model, quantize=each) for kind, each in KINDS.items()}
    return {f"q/{path.name}": path.read_bytes() for path in paths.values()}


@pytest.fixture
def hub(bench, files, tmp_path, monkeypatch):
    tokenizer = (bench.model / "tokenizer.json").read_bytes()
    whole = {path.name: path.read_bytes() for path in bench.model.iterdir()}
    onnx = {f"cpu/{kind}/{name}": data for kind in ("int4", "int8") for name, data in FOLDER.items()}
    part = {f"awq/{name}": data for name, data in whole.items()}
    fake = FakeHub(
        {
            GGUFS: files | {"README.md": b"-", "tokenizer.json": tokenizer},
            MIXED: whole | part | {"m-Q4_0.gguf": files["q/m-Q4_0.gguf"]},
            ONNX: onnx | {"README.md": b"-"},
            ONE: {"m.gguf": files["q/m-Q8_0.gguf"], "mmproj-m.gguf": b"eyes"},
            "org/gated": files,
            "org/split": {f"m-Q4_0-0000{i}-of-00002.gguf": b"GGUF" for i in (1, 2)},
        },
        gated=frozenset({"org/gated"}),
    )
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))
    with reached(fake, monkeypatch, tmp_path / "cache"):
        yield fake


def place(spelled):
    (found,) = local_places([("x", Path(spelled))])
    return found


def fetched(hub):
    """The files that were asked for since."""
    return {path.partition(f"/{COMMIT}/")[2] for path in hub.requests if "/resolve/" in path}


def test_a_type_names_a_variant_and_the_model_alike_online_and_off(bench, hub, tmp_path, monkeypatch, capsys):
    """The report says repository, commit and file; then all of it again without the hub, with its warnings."""
    given = ("--variant", f"four={GGUFS}@{TAG}:q4_0", "--variant", f"eight={GGUFS}:q/m-Q8_0.gguf")
    assert bench.compare(*given, model=f"{GGUFS}:F32", out=str(tmp_path / "out"), **QUIET) == 0
    assert f"from q/m-Q4_0.gguf of {GGUFS} at commit {COMMIT}" in " ".join(capsys.readouterr().err.split())
    assert fetched(hub) == {"q/m-F32.gguf", "q/m-Q4_0.gguf", "q/m-Q8_0.gguf"}
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {each["name"]: (each["grid"], each["details"]["from"]) for each in told["variants"]} == {
        "four": ("Q4_0", f"q/m-Q4_0.gguf of {GGUFS} at commit {COMMIT}"),
        "eight": ("Q8_0", f"q/m-Q8_0.gguf of {GGUFS} at commit {COMMIT}"),
    }
    model = told["model"]
    assert (model["source"], model["hub_id"], model["revision"]) == ("hub", GGUFS, COMMIT)
    assert model["notes"] == ["The weights come from the GGUF file m-F32.gguf (F32 100 % of the parameters)."]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bench.compare(*given, "--quiet", model=f"{GGUFS}:F32", out=str(tmp_path / "off"), **QUIET) == 0
    again = json.loads((tmp_path / "off" / "run.json").read_text())
    assert [each["key"] for each in again["variants"]] == [each["key"] for each in told["variants"]]
    assert sum(f"the cached copy of commit {COMMIT} is used" in line for line in again["warnings"]) == 1


@pytest.mark.parametrize(
    ("spelled", "part", "needed"),
    [
        (f"{GGUFS}@{COMMIT}:q/m-Q4_0.gguf", "q/m-Q4_0.gguf", {"q/m-Q4_0.gguf"}),
        (ONE, "m.gguf", {"m.gguf"}),
        (f"{ONNX}:cpu/int8", "cpu/int8", {f"cpu/int8/{name}" for name in FOLDER if name != "own.py"}),
        (f"{MIXED}:awq", "awq", {f"awq/{name}" for name in ("config.json", "generation_config.json",
                                 "model.safetensors", "tokenizer.json", "tokenizer_config.json")}),
        (f"{MIXED}:Q4_0", "m-Q4_0.gguf", {"m-Q4_0.gguf"}),
    ],
)  # fmt: skip
def test_only_what_is_needed_is_fetched_and_only_once(hub, monkeypatch, spelled, part, needed):
    found = place(spelled)
    assert found.path.parts[-len(Path(part).parts) - 1 :] == (COMMIT, *Path(part).parts)
    assert found.origin == f"{part} of {spelled.partition(':')[0].partition('@')[0]} at commit {COMMIT}"
    assert fetched(hub) == needed
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = place(spelled)
    assert again.path == found.path and len(hub.requests) == before
    assert len(again.warnings) == (f"@{COMMIT}" not in spelled)


@pytest.mark.parametrize(
    ("spelled", "says"),
    [
        (f"{GGUFS}:Q4_1", rf"'{GGUFS}' has no 'Q4_1' that qeval could take \(nearest: Q4_0, Q8_0\); it holds 3 GGUF"),
        (f"{GGUFS}:q/m-Q4_1.gguf", r"\(nearest: Q4_0, Q8_0, F32\)"),
        (GGUFS, rf"holds 3 GGUF files; say which after a colon, as '{GGUFS}:F32': F32, Q4_0, Q8_0\."),
        (f"{GGUFS}@v9:Q4_0", "has no revision 'v9'"),
        (f"{GGUFS}:", "names nothing after its colon"),
        (f"{ONNX}:cpu", "'cpu' may be any of 2 ONNX models"),
        ("org/none:Q4_0", "The hub has no model 'org/none'"),
        ("org/gated:Q4_0", "Access to 'org/gated:Q4_0' is restricted"),
        ("org/split:Q4_0", "is one of the 2 files that a model is split into"),
    ],
)
def test_what_can_not_be_had_is_a_sentence_and_nothing_is_fetched(hub, tmp_path, capsys, spelled, says):
    with pytest.raises(UsageError, match=says):
        place(spelled)
    assert fetched(hub) <= {"q/m-Q4_0.gguf"}
    assert run_program(["quantize", "--model", spelled, "--method", "rtn", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") < 8


def test_a_part_that_is_not_cached_is_told_where_the_hub_does_not_answer(hub, monkeypatch):
    place(f"{GGUFS}:Q4_0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for spelled in (f"{GGUFS}:Q8_0", f"{ONNX}:cpu/int4", f"{GGUFS}@{COMMIT}:Q8_0"):
        with pytest.raises(
            UsageError, match=rf"can't be reached, and '{spelled.replace(f'@{COMMIT}', '')}' .*not whole"
        ):
            place(spelled)
    with pytest.raises(UsageError, match=r"\(HF_HUB_OFFLINE is set\), and of its copy in the cache: .* has no 'Q4_1'"):
        place(f"{GGUFS}:Q4_1")


def test_a_copy_that_other_programs_cached_will_do(hub, monkeypatch):
    """Theirs has no list of the repository's files; what is meant is then one of the files that it has."""
    path = place(f"{GGUFS}:Q4_0").path
    monkeypatch.setattr(fetch_module, "_listed_files", lambda *_: [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert place(GGUFS).path == path
    with pytest.raises(UsageError, match="'org/m-GGUF' has no 'Q8_0' that qeval could take"):
        place(f"{GGUFS}:Q8_0")


def test_a_file_that_was_cut_goes_on_where_it_was(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.breaks_after = len(files["q/m-Q4_0.gguf"]) // 2
    assert place(f"{GGUFS}:Q4_0").path.read_bytes() == files["q/m-Q4_0.gguf"]
    assert hub.ranges[f"/{GGUFS}/resolve/{COMMIT}/q/m-Q4_0.gguf"] > 0


def test_a_folder_cut_short_is_not_taken_from_the_cache(hub, monkeypatch):
    cut = place(f"{ONNX}:cpu/int4").path
    (cut / "m.onnx.data").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="is not whole in its cache"):
        place(f"{ONNX}:cpu/int4")


def test_an_onnx_folder_is_no_model(hub):
    with pytest.raises(UsageError, match="'cpu/int4' of 'org/m-onnx' is an ONNX model, which may be a --variant"):
        checkpoint_of(resolve(f"{ONNX}:cpu/int4"))


def test_a_file_beside_its_repositorys_tokenizer_converts_as_it_does_alone(bench, hub, tmp_path, monkeypatch):
    """The tokenizer of the cached copy is another than the file's own."""
    checkpoint_of(resolve(MIXED))
    beside = checkpoint_of(resolve(f"{MIXED}:Q4_0")).folder
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    alone = checkpoint_of(resolve(str(bench.folder / "m-Q4_0.gguf"))).folder
    assert beside.name == alone.name and beside != alone
    assert (beside / "tokenizer.json").read_bytes() == (alone / "tokenizer.json").read_bytes()
