"""The machine and the software that a run's numbers were made on."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from qeval import __version__
from qeval.models import nvidia
from qeval.store.run import EnvironmentRecord


def describe_environment(device: str) -> EnvironmentRecord:
    """Describe what this process runs on."""
    on_gpu = device.startswith("cuda")
    count = torch.cuda.device_count() if on_gpu else None
    driver = nvidia.read_driver() if on_gpu else None
    return EnvironmentRecord(
        qeval=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        lm_eval=version("lm_eval"),
        platform=platform.platform(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        device=torch.cuda.get_device_name(device) if on_gpu else device,
        gpus=count,
        cuda=torch.version.cuda if on_gpu else None,
        driver=driver.version if driver else None,
        peak_gpu_bytes=sum(torch.cuda.max_memory_allocated(index) for index in range(count)) if count else None,
    )


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
