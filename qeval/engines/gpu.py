"""The memory of an NVIDIA GPU that is in use, as NVML counts it, for runtimes that don't tell."""

from importlib import import_module


def bytes_in_use(index: int) -> int | None:
    """What all processes hold of the GPU `index`; None where NVML can't be asked (extra `qeval[cuda]`)."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used)
    except nvml.NVMLError:
        return None  # no driver, or no such device
