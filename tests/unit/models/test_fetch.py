"""Models from the hub, against a server on this machine that stands in for it."""

import errno
import json

import huggingface_hub
import pytest
from huggingface_hub import constants

from qeval.errors import QevalError, UsageError
from qeval.models.hub import fetch as fetch_module
from qeval.models.hub.fetch import fetch
from qeval.models.load import load_model
from qeval.models.source import resolve
from tests.fixtures.hub import COMMIT, TAG, FakeHub, reached
from tests.fixtures.tiny import save_tiny

MODEL = "org/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("hub") / "tiny", bos=True)
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    return held | {
        "pytorch_model.bin": b"pickle",
        "modeling_own.py": b"import os",
        "consolidated.safetensors": b"the same weights again",
        "original/model.safetensors": b"and again",
    }


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    fake = FakeHub({MODEL: files, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
                    "org/gated": files, "org/empty": {"README.md": b"-"}},
                   gated=frozenset({"org/gated"}))  # fmt: skip
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    with reached(fake, monkeypatch, tmp_path / "cache"):
        yield fake


def test_only_safetensors_config_and_tokenizer_are_fetched(hub, files):
    found = fetch(MODEL)
    folder = found.path
    assert (folder.name, found.commit, found.warnings) == (COMMIT, COMMIT, ())
    fetched = {path.name for path in folder.iterdir()}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                       "tokenizer_config.json"}  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not any("pytorch_model" in path or path.endswith(".py") for path in hub.requests)


def test_a_hub_model_loads_and_knows_its_commit(hub):
    loaded = load_model(resolve(MODEL))
    assert (loaded.info.source, loaded.info.hub_id, loaded.info.revision) == ("hub", MODEL, COMMIT)
    assert loaded.info.name == MODEL


@pytest.mark.parametrize("revision", [None, TAG, COMMIT])
@pytest.mark.parametrize("silence", ["offline", "down", "private"])
def test_a_fetched_model_needs_no_hub_and_says_which_commit_it_is(hub, monkeypatch, revision, silence):
    folder = fetch(MODEL, revision).path
    if silence == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if silence == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    if silence == "private":
        hub.repositories = {}
    before = len(hub.requests)
    again = fetch(MODEL, revision)
    assert again.path == folder
    if revision == COMMIT:
        assert (again.warnings, len(hub.requests)) == ((), before)
    else:
        (warning,) = again.warnings
        assert f"the cached copy of commit {COMMIT} is used" in warning


def test_a_download_that_was_cut_goes_on_where_it_was(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.breaks_after = len(files["model.safetensors"]) // 2
    folder = fetch(MODEL).path
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert hub.ranges[f"/{MODEL}/resolve/{COMMIT}/model.safetensors"] > 0


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("org/none", None, r"The hub has no model 'org/none', or it is private: check the name, or log in"),
        ("meta-llama/Llama-3.1-3B-Instruct", None, r"nearest: meta-llama/Llama-3\.2-3B-Instruct \(llama-3\.2-3b\)"),
        (MODEL, "v9", r"'org/tiny' has no revision 'v9'; give a branch"),
        ("org/gated", None, r"restricted: accept its licence at http://.*/org/gated, then log in .*`hf auth login`"),
        ("org/pickled", None, r"'org/pickled' has its weights as pickles only \(pytorch_model\.bin\), which can run"),
        ("org/empty", None, r"'org/empty' has no weights"),
        ("org/" + "x" * 120, None, r"is no hub id"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(hub, name, revision, says):
    with pytest.raises(UsageError, match=says):
        fetch(name, revision)


@pytest.mark.parametrize(
    ("token", "name", "says"),
    [
        ("right", "org/gated", r"Access to 'org/gated' is restricted"),
        ("right", "org/none", r"no model 'org/none', or it is private: check the name, or ask its owner"),
        ("expired", MODEL, r"The hub does not take your token, so 'org/tiny' can't be fetched: log in again"),
    ],
)
def test_a_token_changes_what_is_advised(hub, monkeypatch, token, name, says):
    hub.token = "right"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=says):
        fetch(name)


def test_a_hub_that_is_offline_is_a_sentence(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="can't be reached, and 'org/tiny' is not whole in its cache"):
        fetch(MODEL)


def test_a_hub_that_nothing_answers_for_is_a_sentence(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="can't be reached"):
        fetch(MODEL)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full: 'org/tiny'"),
        (ConnectionResetError("reset by peer"), r"The download of 'org/tiny' failed \(reset by peer\); run again"),
    ],
)
def test_a_download_that_breaks_is_a_failure_not_wrong_use(monkeypatch, error, says):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(fetch_module, "_repository_files", lambda *_: (["model.safetensors"], None))
    monkeypatch.setattr(fetch_module, "snapshot_download", snapshot_download)
    with pytest.raises(QevalError, match=says) as caught:
        fetch(MODEL)
    assert not isinstance(caught.value, UsageError)


def test_the_bars_of_the_hub_library_are_left_as_they_were(hub):
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    fetch(MODEL)
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_a_model_that_brings_its_own_code_is_refused_in_a_sentence(hub, files):
    config = json.loads(files["config.json"])
    foreign = {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    hub.repositories = {"org/own": {**files, "config.json": json.dumps(config | foreign).encode()}}
    with pytest.raises(UsageError, match=r"names LlamaForCausalLM, which needs Python code from its own repository"):
        load_model(resolve("org/own"))
