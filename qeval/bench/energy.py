"""The energy that a GPU has used, as NVML counts it; no other device is read, and without NVML there is none."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

_MILLI = 1e-3

Joules = Callable[[], float]


def energy_meter(device: str) -> Joules | None:
    """Return what reads the joules that a CUDA device has used since its driver was loaded; None where NVML can't."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None  # of the extra `qeval[cuda]`; a benchmark without it has no energy
    return _meter(nvml, int(index or 0))


def _meter(nvml: Any, index: int) -> Joules | None:
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None  # a driver or a device that doesn't count

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * _MILLI

    return joules
