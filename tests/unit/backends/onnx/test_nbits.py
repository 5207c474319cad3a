"""The kernel's layout: ONNX Runtime reads the very values of the fake-quantized weights, whatever the grid."""

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.nbits import BLOCKS, kernel_block, to_nbits
from qeval.backends.onnx.reference import int8_linear, round_activations
from qeval.errors import UsageError
from qeval.quant.grid import Grid, PerBlock, PerChannel, PerTensor, parse
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_rtn
from tests.fixtures.onnx import apart, product

GRANULARITIES = (*(PerBlock(size) for size in (16, 32, 48, 64, 128, 192, 256)), PerChannel(), PerTensor())
GRIDS = [
    Grid(bits, granularity, symmetric)
    for bits in (2, 3, 4, 5, 6, 8)
    for granularity in GRANULARITIES
    for symmetric in (True, False)
]
WIDTHS = (576, 600, 257)
"""Divided by 64 and no more, by 8, by nothing: last blocks are short in most grids."""
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def noise(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(grid, columns, rows=24):
    return quantize_rtn(noise(rows, columns), grid)


@pytest.mark.parametrize("form", ["nbits", "qdq"])
@every_grid
def test_the_kernel_reads_the_values_of_the_fake_quantized_weight(grid, form):
    for columns in WIDTHS:
        weight = quantized(grid, columns)
        found = product(weight, Style(form, 1))(torch.eye(columns))
        assert apart(found.T, weight.dequantize()) <= 1e-6


@pytest.mark.parametrize("grid", ["int4-g128", "int4-g32-asym", "int8-channel", "int3-g192-asym", "int6-tensor"])
def test_dequantize_linear_becomes_the_kernel(grid):
    """At accuracy level 4 only a kernel that multiplies int8 rounds activations; DequantizeLinear + MatMul doesn't."""
    weight, x = quantized(parse(grid), 576), noise(3, 576, seed=1)
    found = product(weight, Style("qdq", 4))(x)
    assert apart(found, x @ weight.dequantize().T) > 1e-3
    assert apart(found, int8_linear(x, weight)) <= 1e-5


@every_grid
def test_rows_of_a_weight_are_those_of_the_whole(grid):
    weight = quantized(grid, 600)
    whole, part = to_nbits("w", weight), to_nbits("w", weight, slice(5, 21))
    assert (part.bits, part.block, part.columns, part.rows) == (whole.bits, whole.block, 600, 16)
    for name in ("codes", "scales", "zeros"):
        every, some = getattr(whole, name), getattr(part, name)
        assert (some is None) == (every is None)
        assert some is None or (some == every[5:21]).all()


@every_grid
def test_nothing_is_rounded_again(grid):
    """The layout's own arithmetic, block by block, gives each weight bit for bit."""
    weight = quantized(grid, 600)
    packed = to_nbits("w", weight)
    assert packed.block in BLOCKS
    zeros = float(1 << (packed.bits - 1)) if packed.zeros is None else torch.from_numpy(packed.zeros).float()[..., None]
    values = (torch.from_numpy(packed.codes).float() - zeros) * torch.from_numpy(packed.scales)[..., None]
    assert torch.equal(values.flatten(1)[:, :600], weight.dequantize())
    assert not values.flatten(1)[:, 600:].any()


@pytest.mark.parametrize(
    ("grid", "columns", "block"),
    [
        ("g128", 576, 128), ("g192", 576, 64), ("g48", 576, 16), ("g512", 1024, 256), ("g576", 576, 64),
        ("g112", 112, 16), ("g24", 24, 128), ("int8-channel", 576, 64), ("int8-tensor", 640, 128), ("channel", 7, 128),
    ],
)  # fmt: skip
def test_blocks_are_spelled_in_those_of_the_kernel(grid, columns, block):
    """The largest that divides the grid's; where a scale serves a row, one that divides the row if any does."""
    assert kernel_block("w", parse(grid), columns) == block


@pytest.mark.parametrize("form", ["nbits", "qdq"])
@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("name", ["int4-g32-signed", "int4-channel-signed", "int8-g32-signed", "int4-g128-half"])
def test_negative_scales_multiply_right(name, level, form):
    weight, x = quantized(parse(name), 576), noise(3, 576, seed=1)
    assert name.endswith("half") or 0.2 < float((weight.scales < 0).float().mean()) < 0.8
    expected = int8_linear(x, weight) if level == 4 else x @ weight.dequantize().T
    assert apart(product(weight, Style(form, level))(x), expected) <= 1e-5


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8", "nf4"])
def test_floats_are_refused_by_name(name):
    with pytest.raises(UsageError) as told:
        to_nbits("model.layers.0.mlp.up_proj.weight", quantized(parse(name), 576))
    assert str(told.value) == (
        f"ONNX Runtime's MatMulNBits multiplies by integers of 4 or 8 bits, not by {parse(name)} "
        "(model.layers.0.mlp.up_proj.weight); take a grid of integers such as int4-g32, or --backend torch."
    )


@pytest.mark.parametrize("size", [1, 8, 24, 40, 100])
def test_a_block_that_no_kernel_takes_is_named(size):
    with pytest.raises(UsageError) as told:
        to_nbits("model.layers.0.mlp.up_proj.weight", quantized(Grid(4, PerBlock(size)), 576))
    assert str(told.value) == (
        f"ONNX Runtime has no kernel for blocks of {size} (model.layers.0.mlp.up_proj.weight is int4-g{size}): it "
        "takes multiples of 16; choose a group size such as 32 or 128, or --backend torch."
    )


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("grid", [f"int{bits}-{g}{asym}" for bits in (4, 8) for g in ("g32", "g64", "g128", "channel")
                                  for asym in ("", "-asym")])  # fmt: skip
def test_the_reference_computes_what_the_kernel_does_at_accuracy_level_4(grid, rows):
    for columns in (576, 600, 1536):
        weight, x = quantized(parse(grid), columns), noise(rows, columns, seed=rows)
        expected = int8_linear(x, weight)
        assert apart(product(weight, Style("nbits", 4))(x), expected) <= 1e-5
        assert apart(product(weight, Style("nbits", 1))(x), expected) > 1e-3, "the test could tell"


def test_activations_are_rounded_by_row_and_block():
    """Against the slow definition; a block of zeros stays one, and no block sees another's largest value."""
    x = noise(3, 40)
    x[1, 16:32] = 0
    x[2, 3] = 1e4
    found = round_activations(x, 16)
    for row in range(3):
        for start in range(0, 40, 16):
            part = x[row, start : start + 16].double()
            step = part.abs().max() / 127
            expected = (part / step).round() * step if step else part
            assert torch.allclose(found[row, start : start + 16].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(round_activations(found, 16), found)


def test_a_product_keeps_the_leading_dimensions():
    weight = quantized(parse("int4-g32"), 64)
    x = noise(6, 64, seed=2)
    assert torch.equal(int8_linear(x.reshape(2, 3, 64), weight), int8_linear(x, weight).reshape(2, 3, 24))
    assert isinstance(weight, QWeight)
