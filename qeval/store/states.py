"""The baseline's final states, fp32: on disk a record a shard, 4 x d_model bytes a scored position and no more.

Every variant is compared with the same states. So a store on a GPU holds there what it has room for, and reads a
record, whose checksum is verified, once a process.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qeval.files.records import find_record, write_record
from qeval.files.tensors import save_tensors
from qeval.progress import Notify

_SUFFIX = ".safetensors"
_NAME = "states"
_CPU = torch.device("cpu")


class StateStore:
    """The cached final states of one model under one compute type."""

    def __init__(self, folder: Path, warn: Notify, device: torch.device = _CPU, room: int = 0) -> None:
        """Open a folder of states.

        Args:
            folder: Where the records lie.
            warn: Hears of records that are broken; they are made again.
            device: Where states are wanted.
            room: Bytes of the device's memory that states may take until the store is let go.
        """
        self._folder, self._warn = folder, warn
        self._device, self._room = device, room
        self._resident: dict[str, Tensor] = {}

    def write(self, key: str, states: Tensor) -> Path:
        """Store states [positions, width]."""
        self._hold(key, states.float())
        return write_record(
            self._folder,
            key,
            _SUFFIX,
            lambda path: save_tensors({_NAME: states.float().cpu().contiguous()}, path),
        )

    def read(self, key: str) -> Tensor | None:
        """Return the states of `key`, on the device where there is room, or None when they have to be computed."""
        if key in self._resident:
            return self._resident[key]
        path = find_record(self._folder, key, _SUFFIX, self._warn)
        return None if path is None else self._hold(key, load_file(path)[_NAME])

    def _hold(self, key: str, states: Tensor) -> Tensor:
        """Return states on the device, and remember them, if there is room; else as they are."""
        size = states.numel() * states.element_size()
        if self._device.type != "cuda" or size > self._room:
            return states
        self._room -= size
        self._resident[key] = states.to(self._device)
        return self._resident[key]
