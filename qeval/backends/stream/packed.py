"""A saved variant's tensors, read from its folder by rows and dequantized as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qeval.models.reader import Plain, Raw, Stored, by_name, read_rows
from qeval.models.weights import TensorEntry, read_entries
from qeval.quant.grid import Grid, PerTensor, parse
from qeval.quant.pack import unpack
from qeval.quant.qweight import QWeight
from qeval.store.variants import WEIGHTS, Manifest, WeightEntry, verify_variant

_CHUNK_NUMBERS = 1 << 20
"""Weights that are dequantized at a time, so that what unpacking needs beside them stays small."""


@dataclass(frozen=True)
class Packed:
    """A quantized matrix [rows, columns]; `scales` and `zeros` have a row each of its own unless one scale fits all."""

    grid: Grid
    shape: tuple[int, ...]
    codes: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None

    @property
    def raw_bytes(self) -> int:
        """Codes, scales and zero points."""
        parts = (self.codes, self.scales, *((self.zeros,) if self.zeros else ()))
        return sum(part.end - part.start for part in parts)

    def fetch(self, start: int, stop: int) -> Raw:
        """The packed codes of some rows, their scales and zero points."""
        one = isinstance(self.grid.granularity, PerTensor)
        rows = (0, 1) if one else (start, stop)
        beside = [read_rows(part, *rows) for part in (self.scales, self.zeros) if part]
        return (read_rows(self.codes, start, stop), *beside)

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Dequantized in fp32, some rows at a time."""
        step = max(1, _CHUNK_NUMBERS // self.shape[1])
        for first in range(0, len(out), step):
            rows = slice(first, first + step)
            out[rows].copy_(self._rows(raw, rows).dequantize())

    def _rows(self, raw: Raw, rows: slice) -> QWeight:
        packed, *beside = raw
        own = slice(None) if isinstance(self.grid.granularity, PerTensor) else rows
        codes = unpack(packed[rows].numpy(), self.grid.bits, self.shape[1])
        zeros = None
        if self.zeros:
            blocks = beside[0].shape[1]
            zeros = torch.from_numpy(unpack(beside[1][own].numpy(), self.grid.bits, blocks).copy())
        return QWeight(self.grid, torch.from_numpy(codes.copy()), beside[0][own], zeros)


@dataclass(frozen=True, eq=False)
class SavedVariant:
    """What of a variant's folder takes the place of the model's own: tensors by name, and scales of linears' inputs."""

    manifest: Manifest
    tensors: Mapping[str, Stored]
    input_scales: Mapping[str, Tensor]


def saved_variant(folder: Path) -> SavedVariant:
    """The variant of a folder, verified; nothing but its input scales is read into memory.

    Raises:
        UsageError, BrokenRecordError: as `verify_variant`.
    """
    manifest = verify_variant(folder)
    entries = by_name(read_entries([folder / WEIGHTS]))
    packed: dict[str, Stored] = {entry.name: _packed(entry, entries) for entry in manifest.weights}
    floats: dict[str, Stored] = {name: Plain(entries[name]) for name in manifest.floats}
    scales = {name: entries[f"{name}.input_scale"] for name in manifest.input_scales}
    return SavedVariant(
        manifest, packed | floats, {name: read_rows(entry, 0, entry.shape[0]) for name, entry in scales.items()}
    )


def _packed(entry: WeightEntry, entries: Mapping[str, TensorEntry]) -> Packed:
    return Packed(
        parse(entry.grid),
        (entry.rows, entry.columns),
        entries[f"{entry.name}.codes"],
        entries[f"{entry.name}.scales"],
        entries.get(f"{entry.name}.zeros"),
    )
