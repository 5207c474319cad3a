"""What `--model` may say: aliases, hub ids, folders, GGUF files; and the table of aliases."""

import pytest

from qeval.errors import UsageError
from qeval.models.hub.aliases import aliases, list_models, read_aliases
from qeval.models.source import ModelSource, parse_hub_name, resolve, spellings

PROMISED = {
    "llama-2-7b",
    "llama-2-13b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b",
    "codellama-7b",
    "phi-2",
    "phi-3.5-mini",
    "phi-4-mini",
    "gemma-2b",
    "qwen2.5-1.5b",
    "deepseek-r1-distill-qwen-1.5b",
    "orca-2-7b",
    "smollm2-135m",
    "demo",
}


def test_every_promised_alias_is_there_with_one_line():
    listed = {name: (where, line) for name, where, line in list_models()}
    assert set(listed) >= PROMISED
    assert len({where for where, _ in listed.values()}) == len(listed)
    for name, (where, line) in listed.items():
        assert line and "\n" not in line
        assert where.count("/") == 1 or name == "demo"


def test_an_alias_is_its_hub_id_at_the_revision_asked_for():
    hub_id = aliases()["phi-2"].hub_id
    assert resolve("phi-2") == ModelSource("phi-2", "hub", hub_id=hub_id)
    assert resolve("phi-2", "abc").revision == "abc"
    assert resolve("demo") == ModelSource("demo", "demo")


@pytest.mark.parametrize(
    ("typed", "alias"),
    [
        ("llama-3.2-3b-instruct", "llama-3.2-3b"),
        ("Llama-3.2-3B", "llama-3.2-3b"),
        ("llama-3.1-8b-instruct", "llama-3.1-8b"),
        ("Phi-3.5-mini-instruct", "phi-3.5-mini"),
        ("Phi-4-mini-instruct", "phi-4-mini"),
        ("qwen2.5-7b-instruct", "qwen2.5-7b"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1-distill-qwen-1.5b"),
        ("gemma-2-2b-it", "gemma-2-2b"),
        ("mistral-7b-instruct-v0.3", "mistral-7b"),
        ("smollm2-135m-instruct", "smollm2-135m"),
    ],
)
def test_a_model_goes_by_its_name_on_the_hub_too(tmp_path, monkeypatch, typed, alias):
    monkeypatch.chdir(tmp_path)
    assert resolve(typed, "abc") == resolve(alias, "abc")
    (tmp_path / typed.casefold()).mkdir()
    if typed.casefold() != alias:
        assert resolve(typed.casefold()).kind == "folder"


def test_no_two_aliases_share_a_spelling():
    spelled = [name for alias, entry in aliases().items() for name in {*spellings(alias, entry)}]
    assert len(spelled) == len(set(spelled))


def test_hub_ids_folders_and_files_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "m.GGUF").write_bytes(b"GGUF")
    (tmp_path / "demo").mkdir()
    assert resolve("some/model", "v1") == ModelSource("some/model", "hub", hub_id="some/model", revision="v1")
    assert resolve("org/model").kind == "folder"
    assert resolve("org").kind == "folder"
    assert resolve(str(tmp_path / "m.GGUF")).kind == "gguf"
    assert resolve("demo").kind == "demo"
    assert resolve("./demo").kind == "folder"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lama-3.2-3b", "Unknown model 'lama-3.2-3b'; nearest: llama-3.2-3b"),
        ("phi-3.5-mini-base", r"nearest: phi-3\.5-mini, "),
        ("nothing-at-all-like-it", r"Unknown model 'nothing-at-all-like-it'\. `qeval models` lists"),
        ("./none", r"The model folder './none' does not exist"),
        ("/none/of/it", "does not exist"),
        ("x/none.gguf", "GGUF file 'x/none.gguf' does not exist"),
        ("C:/models/m.gguf", "GGUF file 'C:/models/m.gguf' does not exist"),
        ("org/m:", "names nothing after its colon; give a GGUF file"),
        ("a/b/c", "Unknown model 'a/b/c'"),
        ("", "Unknown model ''"),
        ("pytorch_model.bin", "is a pickle, which can run any code"),
        ("model.safetensors", "give the folder"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match=says):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "flag", "revision", "inside"),
    [
        ("org/m:Q8_0", None, None, "Q8_0"),
        ("org/m:Q8_0", "v2", "v2", "Q8_0"),
        ("org/m@v1", None, "v1", None),
        ("org/m@refs/pr/1:sub/m-F16.gguf", None, "refs/pr/1", "sub/m-F16.gguf"),
        ("org/m:cpu/a@b:c/", None, None, "cpu/a@b:c"),
    ],
)
def test_a_hub_id_may_say_its_revision_and_what_is_meant_inside(name, flag, revision, inside):
    assert resolve(name, flag) == ModelSource(name, "hub", hub_id="org/m", revision=revision, inside=inside)


def test_two_revisions_contradict_each_other():
    with pytest.raises(UsageError, match="'org/m@v1:Q8_0' and --revision v2 both name a revision; leave one"):
        resolve("org/m@v1:Q8_0", "v2")


@pytest.mark.parametrize("name", ["org/m:Q8_0", "org/m@v1", "org/m@v1:sub/m.gguf", "C:m.gguf"])
def test_a_path_that_exists_comes_before_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"GGUF") if name.endswith(".gguf") else (tmp_path / name).mkdir()
    assert resolve(name).kind == ("gguf" if name.endswith(".gguf") else "folder")
    assert parse_hub_name(name) is None


def test_a_revision_needs_the_hub(tmp_path):
    for name in ("demo", str(tmp_path)):
        with pytest.raises(UsageError, match="--revision v1 needs a model on the hub"):
            resolve(name, "v1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {hub: org/m, line: x}", "in 'a': Unknown key 'hub'; nearest: hub_id"),
        ("a: {hub_id: org/m}", "a.line: Field required"),
        ("a: {hub_id: 3, line: x}", "a.hub_id: Input should be a valid string"),
        ("a: {line: x}", "either hub_id or demo"),
        ("a: {line: x, demo: true, revision: v1}", "a revision belongs to a hub_id"),
        ("a: 3", "'a' must map"),
        ("- a", "must map names"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(tmp_path, text, says):
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        read_aliases(path)
    assert str(path) in str(caught.value)
