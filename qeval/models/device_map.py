"""`--device-map auto`: a model's layers over all GPUs of a machine, for a model that no single one holds.

accelerate says which module lies on which GPU, and its hooks hand each module what it reads: hidden states go from one
GPU to the next where the layers on it end. Nothing lies in host memory or on disk: `--stream` is the way to that.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from torch import Tensor

from qeval.errors import UsageError
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.checkpoint.weights import TensorEntry
from qeval.models.device import LEAST_WORK_BYTES, free_bytes, in_gib, release_cached

DeviceMap = dict[str, int]
"""The number of the GPU that a module lies on with all that is in it, by the module's name."""


def check_device_map(device: str) -> None:
    """Refuse to spread a model over GPUs where there are none, or where one of them was named.

    Args:
        device: As `resolve_device` names it.

    Raises:
        UsageError: It says what to leave out.
    """
    if not device.startswith("cuda"):
        raise UsageError(
            f"--device-map auto spreads a model over CUDA GPUs, and this run computes on {device}: leave it out, or "
            "read the model by layers (--stream)."
        )
    if device != "cuda":
        raise UsageError(
            f"--device-map auto takes all GPUs that torch sees, and --device {device} names one: leave one of them out "
            "(CUDA_VISIBLE_DEVICES hides GPUs)."
        )


def spread_model(config: Any, entries: Sequence[TensorEntry], dtype: torch.dtype, where: str) -> DeviceMap:
    """Decide which GPU each module of a checkpoint lies on, about as much on each, before a weight is read.

    Args:
        config: The model's configuration.
        entries: The checkpoint's tensors.
        dtype: What the model is computed in.
        where: The checkpoint's folder, for messages.

    Raises:
        UsageError: The GPUs don't hold it together, or the model's code does not say what must stay on one GPU.
    """
    release_cached()
    model, _ = build_meta_model(config, dtype, entries, where)
    together = list(getattr(model, "_no_split_modules", None) or ())
    if not together:
        raise UsageError(
            f"--device-map auto: {type(model).__name__} does not say which of its modules must stay on one GPU; leave "
            "it out, or read the model by layers (--stream)."
        )

    free = {index: free_bytes(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    room: dict[int | str, int | str] = {index: max(0, each - LEAST_WORK_BYTES) for index, each in free.items()}
    for most in (get_balanced_memory(model, dict(room), together), room):  # even shares may leave no room for one layer
        found = infer_auto_device_map(model, dict(most), together, offload_buffers=True)  # without it, it warns
        if all(isinstance(place, int) for place in found.values()):
            return _with_angles_first(model, {name: int(place) for name, place in found.items()})
    needed = sum(each.numel() * each.element_size() for each in model.parameters())
    raise UsageError(
        f"--device-map auto: the model's weights take {in_gib(needed)}, work beside them {in_gib(LEAST_WORK_BYTES)} "
        f"and a layer's room on each GPU, and there are {_list_free(free)}: free memory, or read the model by layers "
        "(--stream)."
    )


def _with_angles_first(model: torch.nn.Module, places: DeviceMap) -> DeviceMap:
    """Return the places with positions' angles (buffers alone) where the embedding is, whose output they take."""
    start = next(iter(places.values()))
    angles = {name for name, each in model.named_modules() if list(each.buffers()) and not list(each.parameters())}
    return {name: start if name in angles else place for name, place in places.items()}


def _list_free(free: Mapping[int, int]) -> str:
    return ", ".join(f"{in_gib(each)} free on cuda:{index}" for index, each in free.items())


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Return the devices that a model's weights lie on, in the order of its modules."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def tightest_device(model: torch.nn.Module) -> torch.device:
    """Return the device, of those that a model's weights lie on, with the least free memory."""
    return min(devices_of(model), key=free_bytes)


def bytes_by_device(tensors: Iterable[Tensor]) -> dict[torch.device, int]:
    """Return how much of the tensors lies on each device."""
    sizes: dict[torch.device, int] = {}
    for each in tensors:
        sizes[each.device] = sizes.get(each.device, 0) + each.numel() * each.element_size()
    return sizes


def placement_in_words(model: torch.nn.Module, layers: Sequence[str]) -> str | None:
    """Return which decoder layers lie on which GPU and what is free there; None where one device holds the model.

    Args:
        model: A model with its weights in memory.
        layers: The names of its decoder layers.
    """
    devices = devices_of(model)
    if len(devices) == 1:
        return None
    on = [next(model.get_submodule(name).parameters()).device for name in layers]
    parts = []
    for device in sorted(devices, key=str):
        held = [number for number, each in enumerate(on) if each == device]
        what = f"layer{'s' if len(held) > 1 else ''} {_spans(held)} of {len(on)}" if held else "no layer"
        parts.append(f"{device}: {what}, {in_gib(free_bytes(device))} free")
    return "; ".join(parts)


def _spans(numbers: Sequence[int]) -> str:
    """Return numbers in ascending order as spans.

    >>> _spans([0, 1, 2, 5])
    '0-2, 5'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
