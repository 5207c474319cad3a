"""The baseline's final states on disk, fp32, a record a shard: 4 x d_model bytes a scored position and no more."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from qeval.store.records import Warn, find_record, write_record
from qeval.store.tensors import save_tensors

_SUFFIX = ".safetensors"
_NAME = "states"


class StateStore:
    """The cached final states of one model under one compute type."""

    def __init__(self, folder: Path, warn: Warn) -> None:
        """`warn` hears of records that are broken; they are made again."""
        self._folder, self._warn = folder, warn

    def write(self, key: str, states: Tensor) -> Path:
        """Keep states [positions, width]."""
        return write_record(
            self._folder,
            key,
            _SUFFIX,
            lambda path: save_tensors({_NAME: states.float().cpu().contiguous()}, path),
        )

    def read(self, key: str) -> Tensor | None:
        """The states of `key`, or None when they have to be computed."""
        path = find_record(self._folder, key, _SUFFIX, self._warn)
        return None if path is None else load_file(path)[_NAME]
