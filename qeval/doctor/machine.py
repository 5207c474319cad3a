"""Python, torch, the driver and the GPUs."""

import platform
from collections.abc import Iterator

import psutil
import torch

from qeval import __version__
from qeval.doctor.checks import DoctorCheck
from qeval.models.device import device_in_words, install_line, resolve_device, why_no_cuda
from qeval.models.nvidia import Driver, has_nvidia_gpu, holders, read_driver


def machine_checks() -> Iterator[DoctorCheck]:
    """Yield what there is to compute with, and whether torch can use it."""
    yield DoctorCheck(part="machine", name="Python", value=f"{platform.python_version()}, qeval {__version__}")
    yield _torch()
    nvidia_driver = read_driver()
    yield _driver(nvidia_driver)
    yield from _gpus(nvidia_driver)
    memory = psutil.virtual_memory()
    yield DoctorCheck(part="machine", name="memory", value=_share_free(int(memory.available), int(memory.total)))
    yield DoctorCheck(part="machine", name="--device auto", value=device_in_words(resolve_device("auto").name))


def _torch() -> DoctorCheck:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    value = f"{torch.__version__}, {build}"
    if not has_nvidia_gpu() or torch.cuda.is_available():
        return DoctorCheck(part="machine", name="torch", value=value)
    # the sentence ends in the command where a command mends it
    reason = why_no_cuda()
    fix = install_line() if install_line() in reason else reason
    return DoctorCheck(
        part="machine", name="torch", value=f"{value}, and can't use the GPU here", status="wrong", fix=fix
    )


def _driver(nvidia_driver: Driver | None) -> DoctorCheck:
    if nvidia_driver is not None:
        serves = f", for CUDA {nvidia_driver.cuda}" if nvidia_driver.cuda else ""
        return DoctorCheck(part="machine", name="NVIDIA driver", value=f"{nvidia_driver.version}{serves}")
    if has_nvidia_gpu():
        return DoctorCheck(
            part="machine", name="NVIDIA driver", value="does not answer", status="wrong", fix="nvidia-smi"
        )
    return DoctorCheck(part="machine", name="NVIDIA driver", value="none")


def _gpus(nvidia_driver: Driver | None) -> Iterator[DoctorCheck]:
    """Yield the GPUs that torch sees; where it sees none, those of the driver."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
            others = [f"{each.name} (process {each.process_id})" for each in holders(uuid)]
            also_used = f"; also used by {', '.join(others)}" if others else ""
            free, total = torch.cuda.mem_get_info(index)
            value = f"{torch.cuda.get_device_name(index)}, {_share_free(free, total)}{also_used}"
            yield DoctorCheck(part="machine", name=f"cuda:{index}", value=value)
        return
    for gpu in nvidia_driver.gpus if nvidia_driver else ():
        value = f"{gpu.name}, {_share_free(gpu.free_bytes, gpu.total_bytes)}"
        yield DoctorCheck(part="machine", name="GPU", value=value)


def _share_free(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
