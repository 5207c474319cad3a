"""Tensors that memory need not hold: some in memory, the rest in a file without a name, gone with its process."""

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.errors import QevalError
from qeval.files.tensors import Spec


class _Place(NamedTuple):
    spec: Spec
    device: torch.device
    offset: int


class Spill:
    """Tensors by key; one that is put again under its key, of the same size, takes the same place."""

    def __init__(self, folder: Path, *, in_memory: int = 0) -> None:
        """`in_memory` bytes stay in memory; the file is made in `folder` when the first tensor goes beyond.

        Raises:
            QevalError: The folder can't be written.
        """
        self._folder, self._room = folder, in_memory
        self._held: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, _Place] = {}
        self._counts: dict[Hashable, int] = {}
        self._end = 0
        with self._errors_in_words():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep `value`; what is kept in memory is the tensor itself.

        Raises:
            QevalError: The file can't be written, say because the disk is full.
        """
        spec = Spec(value.dtype, tuple(value.shape))

        # in memory while there is room
        if key not in self._places:
            self._room += self._held.pop(key).nbytes if key in self._held else 0
            if spec.size_bytes <= self._room:
                self._held[key] = value
                self._room -= spec.size_bytes
                return

        # else in the file, where an earlier tensor of the key and size lay
        known = self._places.get(key)
        if known is None or known.spec.size_bytes != spec.size_bytes:
            known = _Place(spec, value.device, self._end)
            self._end += spec.size_bytes
        self._places[key] = _Place(spec, value.device, known.offset)

        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with self._errors_in_words():
            while data:
                done = os.pwrite(self._file.fileno(), data, known.offset + spec.size_bytes - len(data))
                data = data[done:]

    def get(self, key: Hashable) -> Tensor:
        """Return the tensor of a key, on the device that it was on.

        Raises:
            KeyError: There is none.
            QevalError: The file can't be read.
        """
        if key in self._held:
            return self._held[key]
        (dtype, shape), device, offset = self._places[key]
        data = torch.empty(Spec(dtype, shape).size_bytes, dtype=torch.uint8)
        view = data.numpy().data
        with self._errors_in_words():
            while view:
                count = os.preadv(self._file.fileno(), [view], offset + len(data) - len(view))
                if not count:
                    raise QevalError(f"A temporary file in {self._folder} became shorter while it was used.")
                view = view[count:]
        return data.view(dtype).reshape(shape).to(device)

    def put_each(self, key: Hashable, values: Sequence[Tensor]) -> None:
        """Keep several tensors under one key; what was kept under it before is replaced.

        Raises:
            QevalError: As `put`.
        """
        for place, value in enumerate(values):
            self.put((key, place), value)
        self._counts[key] = len(values)

    def get_each(self, key: Hashable) -> tuple[Tensor, ...]:
        """Return the tensors that were put together under a key.

        Raises:
            KeyError: There are none.
            QevalError: As `get`.
        """
        return tuple(self.get((key, place)) for place in range(self._counts[key]))

    @property
    def specs(self) -> dict[Hashable, Spec]:
        """The type and shape of everything that is kept, by its key."""
        in_memory = {key: Spec(value.dtype, tuple(value.shape)) for key, value in self._held.items()}
        return in_memory | {key: place.spec for key, place in self._places.items()}

    def close(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self._places.clear()
        self._file.close()

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QevalError(
                f"Cannot use a temporary file in {self._folder}: {error.strerror or error}; it needs room there for "
                "what memory does not hold."
            ) from error


@contextmanager
def open_spill(folder: Path, *, in_memory: int = 0) -> Iterator[Spill]:
    """Open a spill for the length of a block."""
    spill = Spill(folder, in_memory=in_memory)
    try:
        yield spill
    finally:
        spill.close()
