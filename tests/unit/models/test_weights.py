"""Weights as they lie on disk: which files, whole or torn, and a hash that depends on their content alone."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.files.hashes import cached_hash
from qeval.models.checkpoint.weights import main_dtype, read_entries, weight_files, weights_sha256

TENSORS = {"b": torch.arange(6, dtype=torch.float16).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def save(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / name)
    return folder


def shard(folder, *parts):
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save(folder, part, name)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def hash_of(folder):
    return weights_sha256(read_entries(weight_files(folder)))


def test_the_hash_does_not_know_how_weights_are_sharded(tmp_path):
    one = save(tmp_path / "one", TENSORS)
    two = shard(tmp_path / "two", {"b": TENSORS["b"]}, {"a": TENSORS["a"]})
    assert hash_of(one) == hash_of(two)


@pytest.mark.parametrize(
    "other",
    [
        TENSORS | {"b": TENSORS["b"].reshape(3, 2)},
        TENSORS | {"b": TENSORS["b"].view(torch.bfloat16)},
        {"c": TENSORS["b"], "a": TENSORS["a"]},
        TENSORS | {"b": TENSORS["b"] + 1},
        {"a": TENSORS["a"]},
    ],
    ids=["shape", "dtype", "name", "value", "missing"],
)
def test_the_hash_knows_all_else(tmp_path, other):
    assert hash_of(save(tmp_path / "one", TENSORS)) != hash_of(save(tmp_path / "other", other))


def test_the_dtype_of_most_parameters_names_the_checkpoint(tmp_path):
    assert main_dtype(read_entries(weight_files(save(tmp_path / "m", TENSORS)))) == "float16"
    ints = save(tmp_path / "i", {"a": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(UsageError, match="but I32"):
        main_dtype(read_entries(weight_files(ints)))


def test_missing_weights_say_what_is_missing(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=r"has no weights: neither model\.safetensors nor"):
        weight_files(empty)
    (empty / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"as pickles only \(pytorch_model\.bin\).*can run any code"):
        weight_files(empty)
    two = shard(tmp_path / "two", {"b": TENSORS["b"]}, {"a": TENSORS["a"]})
    (two / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lists model-00002-of-00002\.safetensors, which is missing"):
        weight_files(two)
    (two / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UsageError, match="is not an index"):
        weight_files(two)


def test_two_shards_with_one_tensor_are_refused(tmp_path):
    folder = shard(tmp_path / "m", TENSORS, {"b": TENSORS["b"]})
    with pytest.raises(UsageError, match="both hold the tensor b"):
        read_entries(weight_files(folder))


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_torn_file_is_named(tmp_path, keep):
    folder = save(tmp_path / "m", TENSORS)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"model\.safetensors' is torn or not safetensors"):
        read_entries(weight_files(folder))


def test_a_hash_is_computed_once_until_its_file_changes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"1")
    calls = []

    def compute():
        calls.append(1)
        return f"hash {len(calls)}"

    assert [cached_hash("file", [path], compute) for _ in range(2)] == ["hash 1", "hash 1"]
    assert cached_hash("other", [path], compute) == "hash 2"
    os.utime(path, ns=(5, 5))
    assert cached_hash("file", [path], compute) == "hash 3"


@pytest.mark.parametrize(
    ("change", "says"), [(lambda t: t[:9], "is torn"), (lambda t: t.replace("aa", "bb"), "changed")]
)
def test_a_record_that_is_torn_or_was_changed_is_named(tmp_path, home, change, says):
    path = tmp_path / "f"
    path.write_bytes(b"1")
    cached_hash("file", [path], lambda: "aa-hash")
    (record,) = (home / "hashes").glob("*.json")
    record.write_text(change(record.read_text()))
    with pytest.raises(BrokenRecordError, match=says) as caught:
        cached_hash("file", [path], lambda: "aa-hash")
    assert str(record) in str(caught.value)


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, home):
    path = tmp_path / "f"
    path.write_bytes(b"1")
    home.write_text("a file where the cache should be")
    with pytest.raises(QevalError, match="Cannot write"):
        cached_hash("file", [path], lambda: "h")
