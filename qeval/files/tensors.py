"""Tensors to a safetensors file, with errors that writers of files know."""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`, with what the file says of itself; it is as readable as any new file.

    Raises:
        OSError: The file can't be written, say because the disk is full; safetensors' own error is none.
    """
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(permissions)  # safetensors' own file is for its owner alone


class Spec(NamedTuple):
    """A tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file that is written a tensor at a time, in any order; the bytes are those of `save_tensors`."""

    _NAMES: ClassVar = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}

    def __init__(self, descriptor: int, specs: Mapping[str, Spec]) -> None:
        """Write the header; safetensors' order is the widest type first, then by name."""
        self._descriptor, self._places = descriptor, dict[str, tuple[Spec, int]]()
        header, offset = {}, 0
        for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            ends = [offset, offset + spec.size_bytes]
            header[name] = {"dtype": self._NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
            self._places[name] = (spec, offset)
            offset = ends[1]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._put(len(text).to_bytes(8, "little") + text, 0)
        os.truncate(descriptor, self._start + offset)

    def write(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write the values of the tensor `name`, its rows in `parts`."""
        spec, offset = self._places.pop(name)
        end = offset + spec.size_bytes
        for part in parts:
            values = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if part.dtype != spec.dtype or tuple(part.shape[1:]) != spec.shape[1:] or offset + len(values) > end:
                raise ValueError(f"{name} was announced as {spec}, not as {part.dtype} {tuple(part.shape)}.")
            self._put(values, self._start + offset)
            offset += len(values)
        if offset != end:
            raise ValueError(f"{name} was announced as {spec}, and {end - offset} bytes of it never came.")

    def check(self) -> None:
        """Refuse a file of which a part was never written."""
        if self._places:
            raise ValueError(f"{', '.join(self._places)} were announced and not written.")

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done


@contextmanager
def tensor_file(path: Path, specs: Mapping[str, Spec]) -> Iterator[TensorFile]:
    """Open a new file of tensors `specs`, all of which have to be written in the block.

    Raises:
        OSError: The file can't be written.
    """
    with path.open("wb") as file:
        tensors = TensorFile(file.fileno(), specs)
        yield tensors
        tensors.check()
