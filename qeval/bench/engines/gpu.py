"""The memory of an NVIDIA GPU that is in use, as NVML counts it, for runtimes that don't tell."""

from typing import Any

from qeval.models.nvidia import ask_nvml


def bytes_in_use(index: int) -> int | None:
    """Return the bytes in use of the GPU `index` by all processes; None without NVML (extra `qeval[cuda]`)."""

    def ask(nvml: Any) -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used)

    return ask_nvml(ask)
