"""`--device`: what `auto` means, what is not here, and a GPU whose memory does not hold the model."""

import json
import os
import stat
import sys
from dataclasses import replace

import pytest
import torch

from qeval.cli.app import run_program
from qeval.compare.machine import model_here, settings_here
from qeval.compare.settings import BackendChoice, CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.settings_json import identity_of
from qeval.compare.task_choice import TaskChoice
from qeval.config import parse_methods
from qeval.errors import UsageError
from qeval.models import load as load_module
from qeval.models.checkpoint.weights import TensorEntry
from qeval.models.device import DeviceChoice, check_device, device_in_words, require_room, resolve_device
from qeval.models.load import load_model
from qeval.models.nvidia import Driver, Gpu, has_nvidia_gpu, read_driver
from qeval.models.source import resolve
from qeval.progress import Silent
from tests.fixtures.bench import Bench, row_files
from tests.fixtures.nvml import FakeGpu, install_cuda, install_nvml, without_gpu
from tests.fixtures.tiny import save_tiny

CPU_BUILD = r"This machine has an NVIDIA GPU, and torch \S+ was built without CUDA; install a build with it: "
LINE = r"pip uninstall -y torch && pip install torch --index-url https://download\.pytorch\.org/whl/"


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """A machine without a GPU."""
    without_gpu(monkeypatch)


def settings(tmp_path, device, ep="auto"):
    return Settings(
        model=ModelChoice("x", device=device), recipes=tuple(parse_methods("rtn")), variants=(), tasks=("kl",),
        corpus=CorpusChoice(), questions=TaskChoice(), calibration=CalibrationChoice(), out=tmp_path / "out",
        backends=BackendChoice(("torch", "ort"), ep=ep),
    )  # fmt: skip


def has_gpu(patch):
    """An NVIDIA GPU's traces on this machine."""
    patch.setattr("qeval.models.device.has_nvidia_gpu", lambda: True)


def test_auto_is_a_cuda_gpu_then_apples_then_the_cpu(monkeypatch):
    assert resolve_device("auto") == DeviceChoice("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == DeviceChoice("mps")
    install_cuda(monkeypatch, [FakeGpu(), FakeGpu()])
    assert resolve_device("auto") == DeviceChoice("cuda")
    assert resolve_device("cuda:1") == DeviceChoice("cuda:1")
    assert resolve_device("cpu") == DeviceChoice("cpu")


def test_a_plan_names_the_gpu_and_its_free_memory(monkeypatch):
    assert device_in_words("cpu").startswith("cpu, ")
    install_cuda(monkeypatch, [FakeGpu(), FakeGpu("NVIDIA L4", 20.25, 22.0)])
    assert device_in_words("cuda:1") == "cuda:1: NVIDIA L4, 20.2 of 22.0 GiB free"
    assert device_in_words("cuda") == "cuda: NVIDIA H100 80GB HBM3, 79.0 of 80.0 GiB free"


@pytest.mark.parametrize(("cuda", "build"), [(13000, "cu130"), (12020, "cu126")])
def test_a_build_without_cuda_beside_a_gpu_is_told_with_what_mends_it(monkeypatch, cuda, build):
    """`auto` warns and goes on, `cuda` is refused, and who says `cpu` hears nothing."""
    has_gpu(monkeypatch)
    install_nvml(monkeypatch, [FakeGpu()], cuda=cuda)
    name, warning = resolve_device("auto")
    assert name == "cpu"
    with pytest.raises(UsageError, match=rf"--device cuda: {CPU_BUILD}{LINE}{build}\."):
        check_device("cuda")
    assert warning is not None
    assert warning.endswith(f"/whl/{build}. Until then everything is computed on the CPU.")
    assert resolve_device("cpu") == DeviceChoice("cpu")


@pytest.mark.parametrize(
    ("name", "gpus", "says"),
    [
        ("cuda", [], r"--device cuda: torch \S+ was built without CUDA, and no NVIDIA GPU is to be seen here\. Or say"),
        ("cuda:3", [FakeGpu()], r"--device cuda:3: torch sees 1 GPU here, cuda:0 \(NVIDIA H100 80GB HBM3\); say that"),
        ("cuda:2", [FakeGpu(), FakeGpu("NVIDIA L4")], r"sees 2 GPUs here, cuda:0 \(.*\), cuda:1 \(NVIDIA L4\); say"),
        ("mps", [], r"--device mps: torch can't use one here; say cpu"),
        ("gpu", [], r"Unknown device 'gpu'; say auto, cpu, cuda, cuda:1 or mps"),
        ("meta", [], r"does not run on 'meta'"),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(monkeypatch, capfd, tmp_path, name, gpus, says):
    install_cuda(monkeypatch, gpus, built_for="13.0" if gpus else None)
    with pytest.raises(UsageError, match=says):
        resolve_device(name)
    model = save_tiny(tmp_path / "model")
    flags = ["--model", str(model), "--method", "rtn", "--device", name, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(load_module, "read_config", None)
    capfd.readouterr()
    assert run_program(["quantize", *flags]) == 2
    heard = capfd.readouterr().err
    assert heard.startswith("error: ")
    assert heard.count("\n") == 1


@pytest.mark.parametrize(
    ("hidden", "gpus", "says"),
    [
        ("", [FakeGpu()], "CUDA_VISIBLE_DEVICES hides all GPUs from torch; unset it"),
        (None, [], "finds no NVIDIA driver that answers; `nvidia-smi` must list the GPU first"),
        (
            None,
            [FakeGpu()],
            r"is built for CUDA 13\.0 and can't use the driver here \(535\.1, for CUDA 12\.2\): update",
        ),
    ],
)
def test_a_gpu_that_a_build_with_cuda_can_not_use_is_told_with_the_cause(monkeypatch, hidden, gpus, says):
    has_gpu(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("qeval.models.nvidia._driver_by_smi", lambda: None)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    install_nvml(monkeypatch, gpus, cuda=12020, version="535.1")
    with pytest.raises(UsageError, match=says):
        check_device("cuda")
    assert resolve_device("auto").name == "cpu"


def entries(parameters, dtype="BF16"):
    return [TensorEntry("w", dtype, (parameters,), None, 0, 0), TensorEntry("ids", "I64", (10**12,), None, 0, 0)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        # 8e9 weights of two bytes: 14.9 GiB
        ([FakeGpu("NVIDIA L4", 10, 22, ((os.getpid(), 1.0), (999_999_999, 12.0)))],
         r"--device cuda:0: the model's weights take 14\.9 GiB and work beside them 0\.5 GiB, and NVIDIA L4 has "
         r"10\.0 GiB of 22\.0 GiB free; a process of another container or user \(process 999999999\) holds 12\.0 GiB: "
         r"free it, read it by layers \(--stream\), or say --device cpu"),
        ([FakeGpu("NVIDIA L4", 10, 22, ((os.getppid(), None),))], r"\(process \d+\) holds some of it: free it"),
        ([FakeGpu("NVIDIA L4", 10, 22), FakeGpu()], r"free it, say --device cuda:1, read it by layers"),
        ([FakeGpu("NVIDIA T4", 14.9, 15)], r"0\.5 GiB, and NVIDIA T4 has 14\.9 GiB of 15\.0 GiB free: read it by"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_nvml", [True, False])
def test_a_gpu_without_room_is_refused_with_who_holds_it_and_what_to_do(monkeypatch, gpus, says, has_nvml):
    install_cuda(monkeypatch, gpus)
    if has_nvml:
        install_nvml(monkeypatch, gpus)
    elif "holds" in says:
        says = r"has 10\.0 GiB of 22\.0 GiB free: free it"
    with pytest.raises(UsageError, match=says):
        require_room(torch.device("cuda:0"), entries(8 * 10**9), 2)


def test_a_gpu_with_room_and_every_cpu_are_taken(monkeypatch):
    install_cuda(monkeypatch, [FakeGpu(free=16)])
    require_room(torch.device("cuda"), entries(8 * 10**9), 2)
    require_room(torch.device("cpu"), entries(10**15), 4)


def test_room_is_looked_for_before_weights_are_read(monkeypatch, tmp_path):
    install_cuda(monkeypatch, [FakeGpu(free=0.4)])
    source = resolve(str(save_tiny(tmp_path / "model")))
    monkeypatch.setattr(load_module, "_read_model", None)
    with pytest.raises(UsageError, match=r"weights take 0\.0 GiB and work beside them 0\.5 GiB, and .* has 0\.4 GiB"):
        load_model(source, device="cuda")


def test_a_provider_follows_the_device(monkeypatch, tmp_path):
    cases = {("auto", "auto"): ("cpu", "cpu"), ("cpu", "openvino"): ("cpu", "openvino")}
    cases |= {("cpu", "auto"): ("cpu", "cpu")}
    for (device, ep), expected in cases.items():
        made = settings_here(settings(tmp_path, device, ep), Silent())
        assert (made.model.device, made.backends.ep) == expected
    install_cuda(monkeypatch, [FakeGpu(), FakeGpu()])
    made = settings_here(settings(tmp_path, "cuda:1"), Silent())
    assert (made.model.device, made.backends.ep) == ("cuda:1", "cuda")


def test_each_gpu_that_may_hold_the_model_has_a_worker(monkeypatch, tmp_path):
    def workers(*totals, device="cuda", **changes):
        install_cuda(monkeypatch, [FakeGpu(total=total) for total in totals])
        return settings_here(replace(settings(tmp_path, device), **changes), Silent()).workers

    assert workers(24) == 1
    assert workers(24, 24, 80) == 3
    assert workers(24, 24, 8, 24) == 2  # a small one, and what comes after it, is left alone
    assert workers(24, 24, device="auto") == 2
    assert workers(24, 24, workers=1) == workers(24, 24, device="cuda:1") == workers(24, 24, executor="ray") == 1
    assert settings_here(settings(tmp_path, "cpu"), Silent()).workers == 1


def test_auto_is_the_same_run_as_the_device_that_it_means(monkeypatch, tmp_path):
    """On a CPU and on a GPU; another device is another run."""
    auto, cpu = (identity_of(settings_here(settings(tmp_path, name), Silent())) for name in ("auto", "cpu"))
    assert auto == cpu
    install_cuda(monkeypatch, [FakeGpu()])
    auto, cuda = (identity_of(settings_here(settings(tmp_path, name), Silent())) for name in ("auto", "cuda"))
    assert auto == cuda != cpu


def test_what_is_told_of_a_device_is_told_once(monkeypatch):
    heard = []
    progress = Silent()
    monkeypatch.setattr(progress, "warn", heard.append, raising=False)
    has_gpu(monkeypatch)
    assert model_here(ModelChoice("x", device="auto"), progress).device == "cpu"
    (said,) = heard
    assert "Until then everything is computed on the CPU" in said


def test_a_run_by_default_is_the_cpus_and_its_record_says_so(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path / "bench")
    asked = {"methods": "rtn:g32", "tasks": "kl", "max_windows": "1"}
    assert bench.compare(**asked, device=None) == 0
    assert "device      cpu, " in capfd.readouterr().err
    record = json.loads((bench.out / "run.json").read_text())
    assert record["settings"]["settings"]["model"]["device"] == "cpu"
    assert record["settings"]["settings"]["backends"]["ep"] == "cpu"
    rows = row_files(bench.out)
    assert bench.compare(**asked, device="cpu") == 0
    assert row_files(bench.out) == rows


def test_a_driver_is_asked_by_nvml_and_else_by_its_own_program(monkeypatch, tmp_path):
    assert read_driver() is None
    install_nvml(monkeypatch, [FakeGpu("NVIDIA L4", 20, 22)], cuda=12040)
    assert read_driver() == Driver("580.65.06", "12.4", (Gpu("NVIDIA L4", 20 << 30, 22 << 30),))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '550.54, NVIDIA L4, 1024, 2048'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert has_nvidia_gpu()
    assert read_driver() == Driver("550.54", None, (Gpu("NVIDIA L4", 1 << 30, 2 << 30),))
    program.write_text("#!/bin/sh\nexit 9\n")
    assert read_driver() is None
