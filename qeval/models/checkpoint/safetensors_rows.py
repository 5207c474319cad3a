"""Tensors of safetensors files by rows: what a model larger than memory is read with.

Bytes are read into memory of our own and never mapped: mapped pages would count as resident until the system takes
them back, and a limit on memory could not be kept.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qeval.errors import QevalError
from qeval.models.checkpoint.weights import TensorEntry

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
Raw = tuple[Tensor, ...]
"""Rows of a tensor as they lie on disk: one part, or codes, scales and zero points."""


class StoredTensor(Protocol):
    """A tensor on disk whose rows (along its first dimension) can be read and decoded apart from each other."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The decoded tensor's shape."""
        ...

    @property
    def raw_bytes(self) -> int:
        """Bytes of all rows on disk."""
        ...

    def fetch(self, start: int, stop: int) -> Raw:
        """Read the bytes of some rows; safe to call from another thread."""
        ...

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Write the values of fetched rows into `out`, converted to its type."""
        ...


@dataclass(frozen=True)
class Plain:
    """A tensor that is stored as it is."""

    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.entry.shape

    @property
    def raw_bytes(self) -> int:
        """As in the file."""
        return self.entry.end - self.entry.start

    def fetch(self, start: int, stop: int) -> Raw:
        """Read rows `start` to `stop` in the file's type."""
        return (read_rows(self.entry, start, stop),)

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Convert rows as they are copied."""
        out.copy_(raw[0])


@dataclass(frozen=True)
class RowsOfParts:
    """Matrices that lie apart, one under the other: an expert's gate and up projections."""

    parts: tuple[Plain, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """All rows of them."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def raw_bytes(self) -> int:
        """As in the file."""
        return sum(part.raw_bytes for part in self.parts)

    def fetch(self, start: int, stop: int) -> Raw:
        """Read what each part has of rows `start` to `stop`, in the file's type."""
        pieces: list[Tensor] = []
        for part in self.parts:
            rows = part.shape[0]
            first, last = max(start, 0), min(stop, rows)
            pieces += part.fetch(first, last) if first < last else ()
            start, stop = start - rows, stop - rows
        return tuple(pieces)

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Convert rows as they are copied."""
        for part, rows in zip(raw, torch.split(out, [len(part) for part in raw]), strict=True):
            rows.copy_(part)


@dataclass(frozen=True)
class Transposed:
    """A matrix that is stored as [inputs, outputs]; the file is read whole for any rows of it."""

    plain: Plain

    @property
    def shape(self) -> tuple[int, ...]:
        """[outputs, inputs]."""
        return self.plain.shape[::-1]

    @property
    def raw_bytes(self) -> int:
        """As in the file."""
        return self.plain.raw_bytes

    def fetch(self, start: int, stop: int) -> Raw:
        """Read columns `start` to `stop` in the file's type."""
        (whole,) = self.plain.fetch(0, self.plain.shape[0])
        return (whole[:, start:stop],)

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Convert rows as they are copied."""
        out.copy_(raw[0].T)


def read_rows(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Read rows `start` to `stop` of a tensor, in the file's type; a tensor without dimensions is one row.

    Raises:
        QevalError: The file became shorter, can't be read, or holds a type that qeval does not compute with.
    """
    dtype = _dtype(entry)
    shape = entry.shape or (1,)
    row_bytes = prod(shape[1:]) * dtype.itemsize
    data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    _read_into(entry.path, entry.start + start * row_bytes, data)
    values = data.view(dtype)
    return values.reshape(stop - start, *shape[1:]) if entry.shape else values.reshape(())


def gather_rows(entry: TensorEntry, rows: Sequence[int]) -> Tensor:
    """Read some rows (ascending) of a matrix, [rows, columns] in the file's type; neighbours are read at once."""
    parts = [read_rows(entry, first, last + 1) for first, last in _runs(rows)]
    return torch.cat(parts)


def entries_by_name(entries: Sequence[TensorEntry]) -> Mapping[str, TensorEntry]:
    """Return entries by their tensor's name."""
    return {entry.name: entry for entry in entries}


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] + 1 == row:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    return runs


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in _DTYPES:
        raise QevalError(f"'{entry.path}' holds {entry.name} as {entry.dtype}, which --stream can't read.")
    return _DTYPES[entry.dtype]


def _read_into(path: Path, offset: int, data: Tensor) -> None:
    view = data.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            _advise(file.fileno())
            done = 0
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], offset + done)
                if not count:
                    raise QevalError(f"'{path}' became shorter while it was read.")
                done += count
    except OSError as error:
        raise QevalError(f"Cannot read {path}: {error.strerror or error}.") from error


def _advise(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
