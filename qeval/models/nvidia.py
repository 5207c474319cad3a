"""NVIDIA's driver: its answers by NVML (`nvidia-ml-py`) where that is installed, else by `nvidia-smi`.

Nothing here needs torch, nor one that was built with CUDA.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import psutil

_SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/nvidiactl")
"""Files that exist where NVIDIA's kernel module is loaded."""
_SMI_SECONDS = 10
_SMI_FIELDS = "driver_version,name,memory.free,memory.total"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU; `memory_bytes` is None where the driver does not tell it."""

    process_id: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver sees it."""

    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Driver:
    """The driver's version, the newest CUDA that it serves (`13.0`; None where only NVML tells), and its GPUs."""

    version: str
    cuda: str | None
    gpus: tuple[Gpu, ...]


def has_nvidia_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU, by the traces of its driver."""
    return shutil.which("nvidia-smi") is not None or any(Path(sign).exists() for sign in _SIGNS)


def read_driver() -> Driver | None:
    """Return what the driver says of itself and its GPUs; None where there is none that answers."""
    return ask_nvml(_driver) or _driver_by_smi()


def holders(uuid: str) -> tuple[Holder, ...]:
    """Return the other processes that hold memory of a GPU, the largest first; none where NVML can't be asked.

    Args:
        uuid: The GPU's, as torch has it: the numbers of CUDA and of NVML may differ.
    """

    def ask(nvml: Any) -> tuple[Holder, ...]:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode())
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        processes = [Holder(each.pid, _process_name(each.pid), each.usedGpuMemory) for each in running]
        others = [each for each in processes if each.process_id != os.getpid()]
        return tuple(sorted(others, key=lambda each: -(each.memory_bytes or 0)))

    return ask_nvml(ask) or ()


def ask_nvml(question: Callable[[Any], _T]) -> _T | None:
    """Return the answer of NVML, or None where it isn't installed, finds no driver, or refuses."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None  # of the extra `qeval[cuda]`
    try:
        nvml.nvmlInit()
        return question(nvml)
    except nvml.NVMLError:
        return None


def _driver(nvml: Any) -> Driver:
    cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    gpus = []
    for handle in handles:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        gpus.append(Gpu(_text(nvml.nvmlDeviceGetName(handle)), int(memory.free), int(memory.total)))
    return Driver(_text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}", tuple(gpus))


def _driver_by_smi() -> Driver | None:
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SMI_SECONDS)
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        gpus = tuple(Gpu(name, int(free) << 20, int(total) << 20) for _, name, free, total in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Driver(rows[0][0], None, gpus) if rows else None


def _process_name(process_id: int) -> str:
    try:
        return psutil.Process(process_id).name()
    except psutil.Error:
        return "a process of another container or user"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
