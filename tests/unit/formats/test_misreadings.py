"""A quantized matrix beside the baseline's: what every grid gives passes, and what is broken is named."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from qeval.formats.base import Values
from qeval.formats.misreadings import compare_matrix
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn

ONES = torch.ones(256)
GRIDS = [f"int{bits}-{size}" for bits in (2, 3, 4, 8) for size in ("g32", "g64-asym", "channel", "tensor")]
WIDE = [f"int{bits}-{size}" for bits in (4, 8) for size in ("g32", "g64-asym", "channel")]


@pytest.fixture(scope="module")
def base():
    """A matrix [96, 256] with rows and columns of unequal sizes, a few large values, and a row of zeros."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 256, generator=draw)
    matrix *= torch.exp(0.4 * torch.randn(96, 1, generator=draw)) * torch.exp(0.4 * torch.randn(256, generator=draw))
    matrix[::7, 3] *= 8
    matrix[5] = 0
    return matrix


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_to_nearest_passes_on_every_grid(base, grid):
    found = compare_matrix(quantize_rtn(base, parse(grid)), base, ONES)
    assert found.ok, found.words


def test_one_scale_for_all_is_judged_by_all_rows(base):
    """A large value beyond the rows that are sampled makes every step coarse."""
    peak = base.clone()
    peak[90, 0] = 40 * base.abs().max()
    found = compare_matrix(quantize_rtn(peak, parse("int8-tensor")), peak, ONES)
    assert found.ok, found.words


@pytest.mark.parametrize(("grid", "times"), [*product(WIDE, (2.0, 1.5, 0.5)), ("int3-channel", 2.0), ("int3-g32", 1.5)])
def test_scales_that_are_not_their_codes_are_named_with_their_factor(base, grid, times):
    read = quantize_rtn(base, parse(grid))
    found = compare_matrix(replace(read, scales=read.scales * times), base, ONES)
    assert not found.ok
    told = float(found.cause.removeprefix("its scales are ").split()[0])
    assert told == pytest.approx(times, rel=0.15)  # clipped ends shrink what codes say


@pytest.mark.parametrize("grid", ["int4-g32", "int4-g32-asym", "int8-g64-asym"])
def test_scales_of_other_blocks_are_named(base, grid):
    """As where a group index is lost: each block is plausible, and none is the right one."""
    read = quantize_rtn(base, parse(grid))
    zeros = None if read.zeros is None else read.zeros.flip(1)
    found = compare_matrix(replace(read, scales=read.scales.flip(1)), base, ONES)
    assert found.cause == "its scales are those of other blocks"
    assert not compare_matrix(replace(read, scales=read.scales.flip(1), zeros=zeros), base, ONES).ok


@pytest.mark.parametrize("grid", ["int2-g32", "int4-channel", "int4-tensor", "int8-g32"])
def test_a_few_rows_of_another_matrix_are_named(base, grid):
    """Four of 96 rows: half of what rounding to four bits per tensor loses, and all that those outputs hold."""
    read = quantize_rtn(base, parse(grid))
    codes = read.codes.clone()
    codes[40:44] = codes[70:74]
    assert compare_matrix(replace(read, codes=codes), base, ONES).words == (
        "rows of it are nothing like it, 4 in all, the first of them row 40"
    )


def test_values_are_judged_by_their_rows_too(base):
    values = base + 0.05 * base.std() * torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
    good = Values(values, "of some kind", 4 * base.numel())
    assert compare_matrix(good, base, ONES).ok
    assert "its scales are 3.0" in compare_matrix(replace(good, values=3 * values), base, ONES).words
    empty = values.clone()
    empty[7] = 0
    assert compare_matrix(replace(good, values=empty), base, ONES).strays == (7,)


def test_an_unrelated_matrix_is_refused_at_two_bits_and_its_own_is_not(base):
    other = quantize_rtn(base[torch.randperm(96, generator=torch.Generator().manual_seed(2))], parse("int2-g64"))
    found = compare_matrix(other, base, ONES)
    assert found.cause is None and found.error > found.allowed and not found.ok
    # GPTQ at two bits makes up for errors in other columns, so that weights move further than zeros would
    own = quantize_rtn(base, parse("int2-g64"))
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(3)) * base.std(1, keepdim=True) * 0.6
    moved = compare_matrix(Values(own.dequantize() + noise, "int2", own.size_bits), base, ONES)
    assert moved.error < moved.allowed
