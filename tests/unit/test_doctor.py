"""`qeval doctor`: every row on a machine that is pretended, what is wrong with what mends it, and the exit code."""

import json
import os
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import CpmAntConfig, LlamaConfig

from qeval.cli.app import run_program
from qeval.doctor import model as model_module
from qeval.doctor.diagnosis import diagnose
from qeval.doctor.hub import hub_checks
from qeval.doctor.machine import machine_checks
from qeval.doctor.model import model_checks, outline_of
from qeval.doctor.packages import _EXTRAS, package_checks
from tests.fixtures.hub import FakeHub, reached
from tests.fixtures.nvml import FakeGpu, install_cuda, install_nvml, without_gpu

LINE = "pip uninstall -y torch && pip install torch --index-url https://download.pytorch.org/whl/cu130"
SIZES = {
    # hidden, MLP, layers, heads, tied; and the number of weights on each one's page at the hub
    "3B": (3072, 8192, 28, 24, True, 3_212_749_824),
    "8B": (4096, 14336, 32, 32, False, 8_030_261_248),
    "70B": (8192, 28672, 80, 64, False, 70_553_706_496),
}
T4, L4, H100 = FakeGpu("NVIDIA T4", 14.5, 15.0), FakeGpu("NVIDIA L4", 23.5, 24.0), FakeGpu()


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """A machine without a GPU, whose hub is not asked."""
    without_gpu(monkeypatch)
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(model_module, "flops_per_second", lambda device, dtype: 1e15 if device == "cuda" else 1e11)
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=60 << 30, total=64 << 30, percent=10.0)
    )


def by_name(checks):
    return {check.name: check for check in checks}


def has_gpu(patch):
    for place in ("qeval.models.device", "qeval.doctor.machine"):
        patch.setattr(f"{place}.has_nvidia_gpu", lambda: True)


def llama(size, **changes):
    hidden, inner, layers, heads, tied, _ = SIZES[size]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=tied,
        dtype="bfloat16", **changes,
    )  # fmt: skip


def folder_of(tmp_path, config):
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_machine_without_a_gpu_is_not_wrong(monkeypatch):
    monkeypatch.setattr("qeval.models.nvidia._driver_by_smi", lambda: None)
    found = by_name(machine_checks())
    assert all(check.status == "ok" for check in found.values())
    assert found["torch"].value.endswith(", built without CUDA")
    assert found["NVIDIA driver"].value == "none"
    assert found["memory"].value == "60.0 of 64.0 GiB free"
    assert found["--device auto"].value == "cpu, 60.0 GiB free"


def test_a_torch_without_cuda_beside_a_gpu_is_wrong_and_the_command_is_told(monkeypatch):
    has_gpu(monkeypatch)
    install_nvml(monkeypatch, [H100])
    found = by_name(machine_checks())
    assert (found["torch"].status, found["torch"].fix) == ("wrong", LINE)
    assert found["NVIDIA driver"].value == "580.65.06, for CUDA 13.0"
    assert found["GPU"].value == "NVIDIA H100 80GB HBM3, 79.0 of 80.0 GiB free"


def test_a_gpu_without_a_driver_that_answers_is_wrong(monkeypatch):
    has_gpu(monkeypatch)
    monkeypatch.setattr("qeval.models.nvidia._driver_by_smi", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = by_name(machine_checks())
    assert (found["NVIDIA driver"].value, found["NVIDIA driver"].status) == ("does not answer", "wrong")
    assert "finds no NVIDIA driver that answers" in found["torch"].fix


def test_gpus_are_listed_with_their_memory_and_who_else_uses_them(monkeypatch):
    gpus = [H100, FakeGpu("NVIDIA L4", 10.0, 24.0, ((os.getppid(), 13.0),))]
    has_gpu(monkeypatch)
    install_cuda(monkeypatch, gpus)
    install_nvml(monkeypatch, gpus)
    found = by_name(machine_checks())
    assert found["torch"].status == "ok"
    assert found["torch"].value.endswith(", built for CUDA 13.0")
    assert found["cuda:0"].value == "NVIDIA H100 80GB HBM3, 79.0 of 80.0 GiB free"
    assert found["cuda:1"].value.startswith("NVIDIA L4, 10.0 of 24.0 GiB free; also used by ")
    assert f"(process {os.getppid()})" in found["cuda:1"].value
    assert found["--device auto"].value.startswith("cuda: NVIDIA H100")


def packages(patch, **owners):
    """Site-packages of these folders, each with its distributions."""
    listed = {folder: list(names) for folder, names in owners.items()}
    patch.setattr(metadata, "packages_distributions", lambda: listed)
    patch.setattr("qeval.doctor.packages.version", lambda name: "1.0")
    runtime = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    patch.setattr("qeval.doctor.packages.import_runtime", lambda: runtime)


def test_both_onnx_runtimes_in_one_environment_are_wrong(monkeypatch):
    packages(
        monkeypatch,
        onnxruntime=["onnxruntime", "onnxruntime-gpu"],
        onnxruntime_genai=["onnxruntime-genai", "onnxruntime-genai-cuda"],
    )
    found = by_name(package_checks())
    assert found["ONNX Runtime"].status == found["ONNX Runtime GenAI"].status == "wrong"
    assert found["ONNX Runtime"].value.startswith("onnxruntime and onnxruntime-gpu side by side")
    assert found["ONNX Runtime"].fix == ("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu")


def test_what_is_optional_is_never_wrong_by_not_being_there(monkeypatch):
    packages(monkeypatch)
    for _, name, _, _ in _EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    found = by_name(package_checks())
    assert {check.status for check in found.values()} == {"note"}
    assert found["ONNX Runtime"].fix == "pip install 'qeval[cpu]'"
    assert found["llama.cpp"].fix == "pip install 'qeval[llamacpp]'"
    install_cuda(monkeypatch, [H100])
    assert by_name(package_checks())["ONNX Runtime"].fix == "pip install 'qeval[cuda]'"


def test_a_runtime_without_cuda_on_a_gpu_machine_is_told(monkeypatch):
    packages(monkeypatch, onnxruntime=["onnxruntime"])
    assert by_name(package_checks())["ONNX Runtime"].status == "ok"
    install_cuda(monkeypatch, [H100])
    found = by_name(package_checks())["ONNX Runtime"]
    assert (found.status, "so --backend ort can't use the GPU" in found.value) == ("note", True)
    assert "qeval[cuda]" in found.fix


@pytest.mark.parametrize(
    ("token", "status", "value"),
    [
        ("right", "ok", "valid, ada's"),
        ("expired", "wrong", "the hub does not take it"),
        (None, "note", "none, so models whose licence must be accepted (Llama, Gemma) can't be fetched"),
    ],
)
def test_a_hub_that_answers_judges_the_token(monkeypatch, tmp_path, token, status, value):
    monkeypatch.setattr("qeval.doctor.hub.get_token", lambda: token)
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with reached(FakeHub({}, {"cais/mmlu": {}}, token="right"), monkeypatch, tmp_path / "cache") as url:
        found = by_name(hub_checks())
    assert (found["hub"].value, found["hub"].status) == (f"{url} answers", "ok")
    assert (found["token"].status, found["token"].value) == (status, value)
    assert found["token"].fix == (None if status == "ok" else "hf auth login")


def test_a_hub_that_is_down_is_wrong_and_one_that_is_not_to_be_asked_is_not(monkeypatch):
    found = by_name(hub_checks())["hub"]
    assert (found.value, found.status, found.fix) == (
        "not asked: HF_HUB_OFFLINE is set", "note", "unset HF_HUB_OFFLINE",
    )  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = by_name(hub_checks())["hub"]
    assert found.status == "wrong"
    assert found.value.startswith("http://127.0.0.1:9 can't be reached (")


def test_caches_that_can_not_be_written_or_lie_on_a_full_disk_are_wrong(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("-")
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * 10**9))
    found = by_name(hub_checks())
    assert found["qeval's cache"].status == found["hub's cache"].status == "wrong"
    assert found["qeval's cache"].value.endswith("which can't be written")
    assert found["qeval's cache"].fix == "export QEVAL_HOME=/a/folder/on/a/larger/disk"
    assert found["hub's cache"].value.endswith(", 2 GB free")
    assert found["hub's cache"].fix.startswith("make room, or: export HF_HOME=")


@pytest.mark.parametrize("size", SIZES)
def test_a_models_size_is_told_from_its_configuration(size):
    outline = outline_of(llama(size))
    hidden, inner, layers, *_, weights = SIZES[size]
    layer = 2 * hidden * hidden + 2 * hidden * 8 * 128 + 3 * hidden * inner
    assert (outline.parameters, outline.layers) == (weights, layers)
    assert (outline.layer_weights, outline.largest_layer) == (layers * layer, layer + 2 * hidden)
    assert (outline.head_weights, outline.stored) == (128256 * hidden, torch.bfloat16)


@pytest.mark.parametrize(
    ("size", "gpus", "whole", "several", "command"),
    [
        ("3B", [L4], ["yes"], "no", ""),
        ("8B", [L4], ["yes"], "no", ""),
        ("8B", [T4], ["no"], "no", " --stream"),
        ("8B", [H100], ["yes"], "no", ""),
        ("8B", [T4, H100], ["no", "yes"], "no", " --device cuda:1"),
        ("8B", [H100, H100], ["yes", "yes"], "yes: --workers 2, a whole model on each", ""),
        ("70B", [H100], ["no"], "no", " --stream"),
        ("70B", [H100, H100], ["no", "no"], "yes: --device-map auto, one model on all of them", " --device-map auto"),
        ("70B", [H100, L4], ["no", "no"], "no", " --stream"),
        ("70B", [FakeGpu("NVIDIA T4", 1.0, 15.0)], ["no"], "no", None),
        ("3B", [], [], None, ""),
        ("70B", [], [], None, " --stream"),
    ],
)
def test_what_fits_is_told_with_the_command_to_run(monkeypatch, tmp_path, size, gpus, whole, several, command):
    """In bf16 on a GPU, in fp32 on a CPU of 60 GiB; nothing is read but config.json."""
    name = folder_of(tmp_path, llama(size))
    install_cuda(monkeypatch, gpus)
    found = by_name(model_checks(name, None))
    assert [found[f"whole on cuda:{index}"].value.partition(":")[0] for index in range(len(gpus))] == whole
    assert (found["on several GPUs"].value if gpus else None) == several or (
        several == "no" and found["on several GPUs"].value.startswith("no: ")
    )
    assert found["whole on the CPU"].value.startswith("yes" if size != "70B" else "no")
    if command is None:
        assert (found["what to run"].value, found["what to run"].status) == ("nothing fits", "wrong")
        assert "time" not in found
        return
    assert found["what to run"].value == f"qeval compare --model {name}{command}"
    assert found["time"].value.endswith(" for the baseline and three variants on WikiText-2 and MMLU")


def test_the_time_is_the_operations_over_the_devices_rate(monkeypatch, tmp_path):
    """A forward pass takes two operations a weight and token; four models, 2.1 million tokens, a head now and then."""
    install_cuda(monkeypatch, [H100])
    found = by_name(model_checks(folder_of(tmp_path, llama("8B")), None))
    operations = 4 * 2 * (6_979_321_856 * 2_097_000 + 525_336_576 * 588_042)
    seconds = operations / (1e15 * 0.6)
    assert 60 * int(found["time"].value.split()[1]) == pytest.approx(seconds, rel=0.15)


def test_of_a_hub_model_the_configuration_alone_is_fetched(monkeypatch, tmp_path):
    files = {"config.json": llama("3B").to_json_string().encode(), "model.safetensors": b"weights"}
    hub = FakeHub({"org/m": files, "org/gated": files}, gated=frozenset({"org/gated"}))
    with reached(hub, monkeypatch, tmp_path / "cache"):
        found = by_name(model_checks("org/m", None))
        assert not any("safetensors" in path for path in hub.requests)
        assert found["model"].value == "org/m: 3.2 billion weights in bfloat16, 6.43 GB"
        assert found["what to run"].value == "qeval compare --model org/m"
        refused = by_name(model_checks("org/gated", None))["model"]
    assert refused.status == "wrong"
    assert "accept its licence at" in refused.value


def test_a_disk_without_room_for_the_download_is_wrong(monkeypatch, tmp_path):
    files = {"config.json": llama("3B").to_json_string().encode()}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=6 * 10**9))
    with reached(FakeHub({"org/m": files}), monkeypatch, tmp_path / "cache"):
        found = by_name(model_checks("org/m", None))["disk"]
    assert (found.value, found.status) == ("6.4 GB to fetch, 6.0 GB free", "wrong")


def test_a_model_that_can_not_be_scored_is_wrong(tmp_path):
    name = folder_of(tmp_path, CpmAntConfig(architectures=["CpmAntForCausalLM"]))
    (found,) = model_checks(name, None)
    assert found.status == "wrong"
    assert "attends to what stands behind a token" in found.value


def test_the_table_and_the_json_say_the_same_and_the_code_says_whether_something_is_wrong(
    monkeypatch, tmp_path, capsys
):
    packages(monkeypatch, onnxruntime=["onnxruntime"])
    monkeypatch.setattr("qeval.models.nvidia._driver_by_smi", lambda: None)
    name = folder_of(tmp_path, llama("3B"))
    assert run_program(["doctor", "--model", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["doctor_version"], told["ok"]) == (1, True)
    assert run_program(["doctor", "--model", name]) == 0
    table = capsys.readouterr().out
    assert all(check["name"] in table for check in told["checks"])
    assert "nothing is wrong (exit code 0)" in table
    packages(monkeypatch, onnxruntime=["onnxruntime", "onnxruntime-gpu"])
    assert run_program(["doctor"]) == 1
    table = " ".join(capsys.readouterr().out.split())
    assert "1 wrong (exit code 1)" in table
    assert run_program(["doctor", "--model", "./nowhere"]) == 2


def test_offline_asks_the_hub_nothing(monkeypatch, tmp_path):
    hub = FakeHub({})
    with reached(hub, monkeypatch, tmp_path / "cache"):
        found = by_name(diagnose(is_offline=True).checks)
        assert found["hub"].value == "not asked: --offline is given"
        assert constants.HF_HUB_OFFLINE is False, "the switch is put back"
    assert hub.requests == []
