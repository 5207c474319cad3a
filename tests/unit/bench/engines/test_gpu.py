"""A GPU's memory in use, by a stand-in for NVML; without one, nothing is told."""

import sys
from types import SimpleNamespace

import pytest

from qeval.bench.engines.gpu import bytes_in_use


class NVMLError(Exception):
    """What NVML raises."""


def nvml(devices):
    def handle(index):
        if index >= len(devices):
            raise NVMLError
        return index

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetMemoryInfo=lambda place: SimpleNamespace(used=devices[place]),
    )


@pytest.mark.parametrize(("index", "expected"), [(0, 7), (1, 9), (2, None)])
def test_each_gpu_has_its_own(index, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml([7, 9]))
    assert bytes_in_use(index) == expected


def test_without_nvml_nothing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert bytes_in_use(0) is None
