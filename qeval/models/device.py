"""The device that a model is computed on: what `--device` means on this machine, and whether the model fits."""

import gc
import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from qeval.errors import UsageError
from qeval.models.checkpoint.weights import TensorEntry, weight_bytes
from qeval.models.nvidia import has_nvidia_gpu, holders, read_driver

_KINDS = ("cpu", "cuda", "mps")
LEAST_WORK_BYTES = 512 << 20
"""Memory of a GPU that a model needs beside its weights, at the least: kernels' workspaces and a small batch."""
_HOLDERS_TOLD = 3


class DeviceChoice(NamedTuple):
    """A device by torch's name (`cpu`, `cuda`, `cuda:1`, `mps`), and what is to be told of the choice."""

    name: str
    warning: str | None = None


def resolve_device(name: str) -> DeviceChoice:
    """Return the device that `name` means here: of `auto` a CUDA GPU, else Apple's, else the CPU.

    Raises:
        UsageError: There is no such device here; it says what to do.
    """
    if name != "auto":
        check_device(name)
        return DeviceChoice(name)
    if torch.cuda.is_available():
        return DeviceChoice("cuda")
    if torch.backends.mps.is_available():
        return DeviceChoice("mps")
    unused = why_no_cuda() if has_nvidia_gpu() else None
    return DeviceChoice("cpu", None if unused is None else f"{unused} Until then everything is computed on the CPU.")


def check_device(name: str) -> torch.device:
    """Return the torch device of that name.

    Raises:
        UsageError: There is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device '{name}'; say auto, cpu, cuda, cuda:1 or mps.") from error
    if device.type not in _KINDS:
        raise UsageError(f"qeval does not run on '{name}'; say auto, cpu, cuda, cuda:1 or mps.")
    if device.type == "cuda":
        _check_cuda(name, device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch can't use one here; say cpu.")
    return device


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device; what other programs may take meanwhile is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def release_cached() -> None:
    """Give back what torch keeps of GPUs' memory for later use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def device_in_words(name: str) -> str:
    """Return a device for a plan: which it is, and of a GPU its name and its free memory."""
    device = torch.device(name)
    if device.type == "mps":
        return "mps: Apple's GPU, which shares the machine's memory"
    if device.type == "cpu":
        return f"cpu, {in_gib(free_bytes(device))} free"
    free, total = torch.cuda.mem_get_info(device)
    return f"{name}: {torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def require_room(device: torch.device, entries: Sequence[TensorEntry], itemsize: int) -> None:
    """Refuse a model that the free memory of a GPU does not hold, before its weights are read.

    Args:
        device: Where it is to lie; of the CPU's memory nothing is said.
        entries: The checkpoint's tensors.
        itemsize: Bytes of a weight as it is computed with.

    Raises:
        UsageError: It says how much lacks, which processes hold the memory where NVML tells it, and what to do.
    """
    if device.type != "cuda":
        return

    needed = weight_bytes(entries, itemsize) + LEAST_WORK_BYTES
    if free_bytes(device) < needed:
        gc.collect()  # an earlier model of this process may wait for that, and its memory with torch
        release_cached()
    free, total = torch.cuda.mem_get_info(device)
    if needed <= free:
        return

    # say how much lacks, who holds memory, and the ways out
    name = torch.cuda.get_device_name(device)
    sentence = (
        f"--device {device}: the model's weights take {in_gib(needed - LEAST_WORK_BYTES)} and work beside them "
        f"{in_gib(LEAST_WORK_BYTES)}, and {name} has {in_gib(free)} of {in_gib(total)} free"
    )
    others = holders(str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))) if needed <= total else ()
    users = ", ".join(_usage_of(each.name, each.process_id, each.memory_bytes) for each in others[:_HOLDERS_TOLD])
    ways = [] if needed > total else ["free it"]
    if roomier := _roomier_gpu(device, needed):
        ways.append(f"say --device {roomier}")

    raise UsageError(
        f"{sentence}{f'; {users}' if users else ''}: {', '.join([*ways, 'read it by layers (--stream)'])}, or say "
        "--device cpu."
    )


def why_no_cuda() -> str:
    """Return why torch has no CUDA device here, and the command that mends it, in sentences."""
    version = torch.__version__
    if torch.version.cuda is None:
        if not has_nvidia_gpu():
            return f"torch {version} was built without CUDA, and no NVIDIA GPU is to be seen here."
        return (
            f"This machine has an NVIDIA GPU, and torch {version} was built without CUDA; install a build with it: "
            f"{install_line()}."
        )

    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs from torch; unset it."
    nvidia = read_driver()
    if nvidia is None:
        return f"torch {version} finds no NVIDIA driver that answers; `nvidia-smi` must list the GPU first."
    return (
        f"torch {version} is built for CUDA {torch.version.cuda} and can't use the driver here ({nvidia.version}"
        f"{f', for CUDA {nvidia.cuda}' if nvidia.cuda else ''}): update the driver, or install a build for it: "
        f"{install_line()}."
    )


def install_line() -> str:
    """Return the command that installs a torch with CUDA, as pytorch.org gives it, for the driver that is here."""
    nvidia = read_driver()
    old = nvidia is not None and nvidia.cuda is not None and int(nvidia.cuda.partition(".")[0]) < 13
    build = "cu126" if old else "cu130"
    return f"pip uninstall -y torch && pip install torch --index-url https://download.pytorch.org/whl/{build}"


def _check_cuda(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: {why_no_cuda()} Or say --device cpu.")
    count = torch.cuda.device_count()
    if index >= count:
        names = ", ".join(f"cuda:{each} ({torch.cuda.get_device_name(each)})" for each in range(count))
        raise UsageError(f"--device {name}: torch sees {count} GPU{'s' if count > 1 else ''} here, {names}; say that.")


def _roomier_gpu(device: torch.device, needed: int) -> str | None:
    """Return another GPU that has room, or None."""
    here = device.index or 0
    others = [index for index in range(torch.cuda.device_count()) if index != here]
    return next((f"cuda:{index}" for index in others if free_bytes(torch.device("cuda", index)) >= needed), None)


def _usage_of(name: str, process_id: int, memory_bytes: int | None) -> str:
    amount = "some of it" if memory_bytes is None else in_gib(memory_bytes)
    return f"{name} (process {process_id}) holds {amount}"


def in_gib(size: int) -> str:
    """Return bytes in words, such as `7.2 GiB`."""
    return f"{size / 2**30:.1f} GiB"
