"""`auto` made plain: which device, which provider and how many workers a command takes on this machine."""

from dataclasses import replace
from itertools import takewhile

import torch

from qeval.compare.settings import AUTO, BackendChoice, ModelChoice, Settings
from qeval.models.device import free_bytes, resolve_device
from qeval.models.device_map import check_device_map
from qeval.progress import Progress


def settings_here(settings: Settings, progress: Progress) -> Settings:
    """Return the settings with the device, the provider and the number of workers that they mean here.

    Raises:
        UsageError: There is no such device.
    """
    model = model_here(settings.model, progress)
    here = replace(settings, model=model, backends=backends_here(settings.backends, model.device))
    return replace(here, workers=workers_here(here))


def workers_here(settings: Settings) -> int:
    """Return how many processes score: what was asked for, else one on each GPU where no one GPU was named.

    GPUs are counted from the first until one has less than half of its memory: a small one (of a display, say) may not
    hold the model. The demo, a model on several GPUs and a cluster have one worker unless more are asked for, and so
    has a run with endpoints, which asks them several things at once anyway.
    """
    if settings.workers:
        return settings.workers
    is_spread = settings.model.device_map is not None or bool(settings.backends.endpoints)
    is_alone = settings.executor == "ray" or settings.model.name == "demo" or is_spread
    if is_alone or settings.model.device != "cuda":
        return 1
    totals = [torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count())]
    return len(list(takewhile(lambda total: total >= totals[0] / 2, totals)))


def shares_device(settings: Settings) -> bool:
    """Return whether all workers compute on one device: on this machine's CPU, or on a GPU that was named."""
    return settings.executor == "local" and settings.model.device != "cuda"


def with_limit(settings: Settings) -> ModelChoice:
    """Return the choice of a model; of a streamed one with what each of several workers on one device may take."""
    choice = settings.model
    if not choice.stream or choice.max_memory or settings.worker_count == 1 or not shares_device(settings):
        return choice
    return replace(choice, max_memory=free_bytes(torch.device(choice.device)) // 2 // settings.worker_count)


def model_here(choice: ModelChoice, progress: Progress) -> ModelChoice:
    """Return the choice of a model with the device that it means here; what is to be told of that is told.

    Raises:
        UsageError: There is no such device, or a model is to be spread where it can't.
    """
    device = resolve_device(choice.device)
    if device.warning is not None:
        progress.warn(device.warning)
    if choice.device_map is not None:
        check_device_map(device.name)
    return replace(choice, device=device.name)


def backends_here(choice: BackendChoice, device: str) -> BackendChoice:
    """Return the choice of backends with ONNX Runtime's provider for the device."""
    return replace(choice, ep=provider_here(choice.ep, device))


def provider_here(ep: str, device: str) -> str:
    """Return ONNX Runtime's provider: of `auto` that of the device.

    >>> provider_here("auto", "cuda:1"), provider_here("auto", "mps"), provider_here("openvino", "cuda")
    ('cuda', 'cpu', 'openvino')
    """
    if ep != AUTO:
        return ep
    return "cuda" if device.startswith("cuda") else "cpu"
