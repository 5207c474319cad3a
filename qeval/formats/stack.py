"""Matrices one above the other as one: an expert's gate and up lie apart in files. Pure."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qeval.formats.base import DecodedMatrix, Values
from qeval.formats.misreadings import values_of
from qeval.quant.grid import Grid, PerChannel, PerTensor
from qeval.quant.qweight import QWeight


def stack_rows(parts: Sequence[DecodedMatrix]) -> DecodedMatrix:
    """Return matrices of one width as one: integers where all are on grids that rows can share, else values."""
    if len(parts) == 1:
        return parts[0]
    rows = [_by_rows(part) for part in parts if isinstance(part, QWeight)]
    if len(rows) == len(parts) and len({(part.grid.bits, part.grid.granularity) for part in rows}) == 1:
        return _on_one_grid(rows)
    forms = dict.fromkeys(part.form if isinstance(part, Values) else str(part.grid) for part in parts)
    return Values(torch.cat([values_of(part) for part in parts]), ", ".join(forms), sum(p.size_bits for p in parts))


def _by_rows(part: QWeight) -> QWeight:
    """Return a matrix whose scales are its rows' own, so that other rows may have others."""
    if not isinstance(part.grid.granularity, PerTensor):
        return part
    count = len(part.codes)
    zeros = None if part.zeros is None else part.zeros.expand(count, 1)
    return QWeight(replace(part.grid, granularity=PerChannel()), part.codes, part.scales.expand(count, 1), zeros)


def _on_one_grid(parts: Sequence[QWeight]) -> QWeight:
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    if all(part.zeros is None for part in parts):
        return QWeight(parts[0].grid, codes, scales, None)
    grid = parts[0].grid
    assert isinstance(grid, Grid)  # no reader gives another one
    middle = 1 << (grid.bits - 1)
    zeros = [torch.full_like(p.scales, middle, dtype=torch.uint8) if p.zeros is None else p.zeros for p in parts]
    return QWeight(replace(grid, symmetric=False), codes, scales, torch.cat(zeros))
