"""A saved variant's tensors, read from its folder by rows and dequantized as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qeval.models.checkpoint.safetensors_rows import Plain, Raw, StoredTensor, entries_by_name, read_rows
from qeval.models.checkpoint.weights import TensorEntry, read_entries
from qeval.quant.grid import PerTensor, WeightGrid, parse
from qeval.quant.pack import unpack
from qeval.quant.qweight import QWeight
from qeval.quant.scheme import Scheme, TensorFormat, scheme_of
from qeval.quant.stored_scales import decode_scales, repeat_scales, rows_of_scales
from qeval.quant.variant import formats_of_inputs
from qeval.store.variants import WEIGHTS, Manifest, WeightEntry, verify_variant

_CHUNK_NUMBERS = 1 << 20
"""Weights that are dequantized at a time, so that what unpacking needs beside them stays small."""


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix [rows, columns].

    `scales` and `zeros` have a row for each of the matrix's unless one fits all of it, or a tile of it.
    """

    grid: WeightGrid
    shape: tuple[int, ...]
    codes: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None
    global_scale: TensorEntry | None = None

    @property
    def raw_bytes(self) -> int:
        """Codes, scales and zero points."""
        parts = [part for part in (self.codes, self.scales, self.zeros, self.global_scale) if part]
        return sum(part.end - part.start for part in parts)

    def fetch(self, start: int, stop: int) -> Raw:
        """Return the packed codes of some rows, their scales, and their zero points or the matrix's scale."""
        rows = rows_of_scales(self.grid, start, stop)
        beside = [repeat_scales(read_rows(self.scales, *rows), self.grid, start, stop)]
        beside += [read_rows(self.zeros, *rows)] if self.zeros else []
        beside += [read_rows(self.global_scale, 0, 1)] if self.global_scale else []
        return (read_rows(self.codes, start, stop), *beside)

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Dequantized in fp32, some rows at a time."""
        step = max(1, _CHUNK_NUMBERS // self.shape[1])
        for first in range(0, len(out), step):
            rows = slice(first, first + step)
            out[rows].copy_(self._rows(raw, rows).dequantize())

    def _rows(self, raw: Raw, rows: slice) -> QWeight:
        packed, *beside = raw
        grid_rows = slice(None) if isinstance(self.grid.granularity, PerTensor) else rows
        codes = unpack(packed[rows].numpy(), self.grid.bits, self.shape[1])
        zeros = None
        if self.zeros:
            blocks = beside[0].shape[1]
            zeros = torch.from_numpy(unpack(beside[1][grid_rows].numpy(), self.grid.bits, blocks).copy())
        global_scale = beside[-1] if self.global_scale else None
        scales = decode_scales(beside[0][grid_rows], self.grid, global_scale)
        return QWeight(self.grid, torch.from_numpy(codes.copy()), scales, zeros, global_scale)


@dataclass(frozen=True, eq=False)
class SavedVariant:
    """A variant's folder as changes to the model.

    Attributes:
        manifest: What it says of itself.
        tensors: Its weights by name.
        input_scales: What linears' inputs are multiplied by.
        input_rotations: What turns linears' inputs, before that.
        scheme: What is rounded beside the weights.
        ranges: The largest magnitudes of the scheme's static formats.
        rounded_inputs: The formats of linears' inputs.
    """

    manifest: Manifest
    tensors: Mapping[str, StoredTensor]
    input_scales: Mapping[str, Tensor]
    input_rotations: Mapping[str, Tensor]
    scheme: Scheme
    ranges: Mapping[str, Tensor]
    rounded_inputs: Mapping[str, TensorFormat]


def saved_variant(folder: Path, scheme: Scheme | None = None) -> SavedVariant:
    """Return the variant of a folder, verified; nothing but what is done to inputs, and ranges, is read into memory.

    Args:
        folder: The variant's.
        scheme: What is rounded beside its weights, where that is not what its manifest says; it is dynamic.

    Raises:
        UsageError, BrokenRecordError: as `verify_variant`.
    """
    manifest = verify_variant(folder)
    entries = entries_by_name(read_entries([folder / WEIGHTS]))
    packed: dict[str, StoredTensor] = {entry.name: _packed(entry, entries) for entry in manifest.weights}
    floats: dict[str, StoredTensor] = {name: Plain(entries[name]) for name in manifest.floats}
    own = scheme is None
    others = manifest.parsed_input_formats if own else {}
    effective = scheme_of(manifest.scheme) if scheme is None else scheme
    return SavedVariant(
        manifest=manifest,
        tensors=packed | floats,
        input_scales={name: _vector(entries[f"{name}.input_scale"]) for name in manifest.input_scales},
        input_rotations={name: _vector(entries[f"{name}.input_rotation"]) for name in manifest.input_rotations},
        scheme=effective,
        ranges={name: _vector(entries[f"{name}.range"]) for name in manifest.ranges if own},
        rounded_inputs=formats_of_inputs(manifest.activation_inputs, effective, others),
    )


def _vector(entry: TensorEntry) -> Tensor:
    """Read a small tensor whole; one number may have no dimension."""
    return read_rows(entry, 0, entry.shape[0] if entry.shape else 1)


def _packed(entry: WeightEntry, entries: Mapping[str, TensorEntry]) -> PackedMatrix:
    return PackedMatrix(
        parse(entry.grid),
        (entry.rows, entry.columns),
        entries[f"{entry.name}.codes"],
        entries[f"{entry.name}.scales"],
        entries.get(f"{entry.name}.zeros"),
        entries.get(f"{entry.name}.global_scale"),
    )
