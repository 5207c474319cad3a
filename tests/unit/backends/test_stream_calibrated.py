"""`--stream` for methods that calibrate: the same files as without it, whatever lies in memory and whatever on disk."""

import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file

from qeval.backends.stream.backend import inspect, streamed
from qeval.backends.stream.head import StreamedHead
from qeval.cli.app import run_program
from qeval.identity import digest_file
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.checkpoint.weights import read_entries
from qeval.models.silence_transformers import quiet
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.trace import decoder_layers
from qeval.quantize import fisher
from qeval.store.rows import concat
from tests.fixtures.bench import Bench
from tests.fixtures.families import STREAMED_FAMILIES, tiny_family
from tests.fixtures.tiny import tiny_tokenizer

CALIBRATED = [
    "awq:g32",
    "awq:int3-g32-asym-noclip-head",
    "gptq:g32",
    "awq:nvfp4-head",
    "gptq:mxfp4-even",
    "gptq:fp8-tile128",
    "mixed:g32-positional",
    "mixed:g32-measured-6bpw",
    "mixed-rtn:g32-measured-clip",
    "mixed:int3-g32-fisher",
    "mixed:int4-g32/nvfp4/fp8-tile128/bf16-6bpw",
    "mixed-rtn:int4-g32/mxfp4/int8-channel-fisher-6bpw",
]
ROOMY = "64MiB"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The manifests of all variants, made with the whole model in memory."""
    with pytest.MonkeyPatch.context() as patch:
        yield manifests(place, tmp_path_factory.mktemp("home"), patch)


def manifests(place, home, patch, *more, methods=tuple(CALIBRATED)):
    """What `compare` makes of every method, without the seconds that it took."""
    patch.setenv("QEVAL_HOME", str(home))
    flags = {"methods": ",".join(methods), "calibration_samples": "6", "calibration_length": "24", "tasks": "ppl"}
    assert place.compare("--quiet", *more, max_windows="1", out=str(home / "out"), **flags) == 0
    found = [json.loads(path.read_text()) for path in home.rglob("manifest.json")]
    return {
        each["key"]: {name: value for name, value in each.items() if name not in ("seconds", "sha256")}
        for each in found
    }


def rows(out, kind):
    found = concat(kind, sorted((out / "rows" / kind).glob("*.parquet"))).to_pylist()
    return sorted(found, key=lambda row: (row["variant"], row["window"], row["position"]))


def fuse(folder, model):
    """Write a checkpoint under the model's own names: experts in stacks, as transformers holds them."""
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "fused", "methods"),
    [
        ("Mixtral", False, ["rtn:g32-clip", "awq:g32", "gptq:g32", "mixed:g32-measured-6bpw", "mixed:int3-g32-fisher"]),
        ("Qwen3Moe", True, ["rtn:g32", "awq:g32"]),
        ("GPT2", False, ["rtn:g32-clip", "gptq:g32"]),
    ],
)
def test_experts_and_turned_matrices_stream_to_the_same_files_and_rows(family, fused, methods, tmp_path, monkeypatch):
    """In fp16, as real ones are: fp32 in a file is mapped where it lies, which the last bits of products depend on."""
    place, model = Bench(tmp_path), tiny_family(family, tie_word_embeddings=False).half()
    model.config.dtype = torch.float16
    shutil.rmtree(place.model)
    with quiet():
        model.save_pretrained(place.model)
    if fused:
        fuse(place.model, model)
    tiny_tokenizer().save_pretrained(place.model)
    named = {entry.name for entry in read_entries([place.model / "model.safetensors"])}
    assert any(".experts.0." in name for name in named) == (family.endswith(("tral", "Moe")) and not fused)
    found = {}
    for name, more in (("whole", ()), ("streamed", ("--stream", "--max-memory", ROOMY))):
        found[name] = manifests(place, tmp_path / name, monkeypatch, *more, methods=methods)
    assert found["streamed"] == found["whole"]
    assert len(found["whole"]) == len(methods)
    one, other = (rows(tmp_path / name / "out", "tokens") for name in found)
    assert one == other


def weightless_of(model, folder):
    model.save_pretrained(folder)
    entries = read_entries([folder / "model.safetensors"])
    weightless, _ = build_meta_model(model.config, torch.float32, entries, "here")
    made = streamed(weightless, entries, torch.device("cpu"), "float32")
    return made, inspect(made, "float32")[1]


@pytest.mark.parametrize("room", [None, 0])
def test_variants_are_the_same_files_whatever_fits_in_memory(place, whole, tmp_path, monkeypatch, room):
    if room is not None:
        monkeypatch.setattr("qeval.compare.stream.room_for_states", lambda *_: room)
    found = manifests(place, tmp_path, monkeypatch, "--stream", "--max-memory", ROOMY)
    assert found.keys() == whole.keys()
    assert len(found) == len(CALIBRATED)
    for key, manifest in found.items():
        assert manifest == whole[key], manifest["recipe"]


def test_quantize_streams_to_the_same_files(place, whole, tmp_path):
    shared = ["--model", str(place.model), "--calibration", str(place.seen), "--calibration-samples", "6"]
    shared += ["--calibration-length", "24", "--method", "awq:g32", "--quiet", "--device", "cpu"]
    assert run_program(["quantize", *shared, "--stream", "--max-memory", ROOMY, "--out", str(tmp_path / "awq")]) == 0
    found = json.loads((tmp_path / "awq" / "manifest.json").read_text())
    assert found["weights_sha256"] == whole[found["key"]]["weights_sha256"]
    assert digest_file(tmp_path / "awq" / "weights.safetensors") == found["weights_sha256"]
    assert [path.name for path in tmp_path.iterdir()] == ["awq"]


def test_quantize_streams_no_other_tools_method(place, tmp_path, capfd):
    shared = ["quantize", "--model", str(place.model), "--method", "hqq", "--out", str(tmp_path / "hqq")]
    assert run_program([*shared, "--stream", "--max-memory", ROOMY]) == 2
    assert "hqq: other tools quantize models that are in memory" in capfd.readouterr().err
    assert not (tmp_path / "hqq").exists()


def test_memory_that_does_not_hold_a_layer_at_work_is_refused_with_what_would(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    flags = {"methods": "awq:g32", "max_windows": "1", "tasks": "ppl", "out": str(tmp_path / "out")}
    assert place.compare("--quiet", "--stream", "--max-memory", "2MiB", **flags) == 2
    told = capfd.readouterr().err
    assert "--max-memory 2MiB is less than making 'awq:g32' takes" in told
    least = re.search(r"give at least (\d+MiB)", told)[1]
    assert place.compare("--quiet", "--stream", "--max-memory", least, **flags) == 0


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
def test_gradients_go_back_through_a_head_in_parts(family, tmp_path):
    model = tiny_family(family)
    made, settings = weightless_of(model, tmp_path)
    parts = StreamedHead(made.checkpoint[made.head_name], settings, 37, torch.device("cpu"))
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        fisher.label_gradient(head, states, torch.Generator().manual_seed(1)) for head in (parts, head_of(model))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_part_of_a_head_is_in_memory_at_a_time(tmp_path, monkeypatch):
    made, settings = weightless_of(tiny_family("Llama"), tmp_path)
    read, alive = StreamedHead._part, []

    def part(self, rows):
        assert not [each for each in alive if each() is not None]
        alive.append(weakref.ref(head := read(self, rows)))
        return head

    monkeypatch.setattr(StreamedHead, "_part", part)
    head = StreamedHead(made.checkpoint[made.head_name], settings, 37, torch.device("cpu"))
    head.transposed(head.logits(torch.zeros(3, 64)))
    assert len(alive) == 14


@pytest.mark.parametrize("family", STREAMED_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_folds_are_those_of_the_whole_model(family, tied, tmp_path):
    model = tiny_family(family, tie_word_embeddings=tied)
    made, _ = weightless_of(model, tmp_path)
    found, _ = inspect(made, "float32", folds=True)
    assert found == describe_model(model)
    layers = decoder_layers(made.model).values()
    assert {parameter.device.type for layer in layers for parameter in layer.parameters()} == {"meta"}
