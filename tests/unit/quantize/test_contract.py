"""What every grid and quantizer owes, over the whole table of grids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qeval.errors import UsageError
from qeval.quant.awq import ALPHAS, choose_clip, choose_scales
from qeval.quant.grid import FLOAT_GRIDS, Grid, PerBlock, PerChannel, PerTensor, PerTile, parse
from qeval.quant.pack import pack, unpack
from qeval.quant.qweight import check_fits, from_blocks, to_blocks
from qeval.quant.rtn import quantize_by_rows, quantize_rtn, rounding_error
from qeval.quant.statistics import Accumulator, InputStatistics
from qeval.quant.stored_scales import encode_scales

GRIDS = [
    Grid(bits, granularity, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity in (PerBlock(32), PerBlock(128), PerChannel(), PerTensor())
    for symmetric in (True, False)
]
GRIDS += [
    Grid(bits, granularity, span=span)
    for bits, granularity in ((4, PerBlock(32)), (4, PerTensor()), (8, PerChannel()))
    for span in ("half", "signed")
]
every_integer_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_grid = pytest.mark.parametrize("grid", [*GRIDS, *FLOAT_GRIDS.values()], ids=str)


def matrix(rows=6, columns=200, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scale_by_weight(weight, grid):
    q = quantize_rtn(weight, grid)
    expanded = q.scales.unsqueeze(-1).expand_as(to_blocks(weight, grid))
    return q, from_blocks(expanded, *weight.shape)


@every_integer_grid
def test_error_is_at_most_half_a_step_where_nothing_saturates(grid):
    weight = matrix()
    q, scale = scale_by_weight(weight, grid)
    error = (q.dequantize() - weight).abs()
    # an integer zero point moves the range by up to half a step, so an end may saturate by as much
    # and where one weight goes to the lowest code, another one as large of the other sign saturates by a step
    allowed = scale.abs() * (0.5 if grid.symmetric and (grid.span or grid.default_span) != "signed" else 1.0)
    assert bool((error <= allowed * (1 + 1e-5) + 1e-7).all())


@every_grid
def test_a_matrix_that_comes_by_rows_is_quantized_as_the_whole(grid):
    weight = matrix(rows=7)
    whole, parts = quantize_rtn(weight, grid), list(quantize_by_rows(lambda: torch.split(weight, 3), grid))
    one = isinstance(grid.granularity, PerTensor)
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(parts[0].scales if one else torch.cat([part.scales for part in parts]), whole.scales)
    if whole.zeros is not None:
        assert torch.equal(parts[0].zeros if one else torch.cat([part.zeros for part in parts]), whole.zeros)
    assert all(torch.equal(part.scales, whole.scales) for part in parts) == (len(parts) == 1 or one)
    assert (len(parts) == 1) == isinstance(grid.granularity, PerTile)  # a tile's rows come together
    assert all(part.global_scale == whole.global_scale for part in parts)


@every_integer_grid
def test_quantizing_again_changes_nothing_much(grid):
    once = quantize_rtn(matrix(), grid).dequantize()
    again = quantize_rtn(once, grid)
    scale = again.scales.abs().max()
    stays = grid.symmetric and grid.span != "half"  # the largest weight moves to half a step inside
    assert float((again.dequantize() - once).abs().max()) <= float(scale) * (1e-4 if stays else 0.51)


@every_grid
def test_input_is_not_touched_and_codes_fit_the_bits(grid):
    weight = matrix()
    before = weight.clone()
    q = quantize_rtn(weight, grid)
    assert torch.equal(weight, before)
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < 1 << grid.bits
    assert q.dequantize().dtype == torch.float32


@every_grid
def test_rows_rounded_a_few_at_a_time_are_the_same_to_the_bit(grid, monkeypatch):
    clip = 0.5 + 0.5 * torch.rand(grid.scale_shape(6, 200), generator=torch.Generator().manual_seed(2))
    whole = quantize_rtn(matrix(), grid, clip)
    ranges = choose_clip(matrix(), grid, matrix(50))
    monkeypatch.setattr("qeval.quant.rtn._WEIGHTS_AT_ONCE", 700)
    monkeypatch.setattr("qeval.quant.awq._WEIGHTS_AT_ONCE", 1000)
    few = quantize_rtn(matrix(), grid, clip)
    assert torch.equal(few.codes, whole.codes)
    assert torch.equal(few.scales, whole.scales)
    assert torch.equal(choose_clip(matrix(), grid, matrix(50)), ranges)


@every_grid
def test_zeros_stay_zeros(grid):
    assert torch.equal(quantize_rtn(torch.zeros(3, 70), grid).dequantize(), torch.zeros(3, 70))


@every_grid
def test_one_huge_outlier_leaves_other_scales_alone(grid):
    weight = matrix()
    weight[0, 0] = 1e6
    q = quantize_rtn(weight, grid)
    assert bool(torch.isfinite(q.dequantize()).all())
    if not grid.spans_rows:
        assert torch.equal(q.scales[1:], quantize_rtn(matrix(), grid).scales[1:])


@every_grid
def test_rounding_error_is_the_integers_error(grid):
    weight = matrix()
    q = quantize_rtn(weight, grid)
    error = from_blocks(rounding_error(to_blocks(weight, grid), grid), *weight.shape)
    assert torch.allclose(error, q.dequantize() - weight, atol=1e-6)


@every_grid
def test_size_counts_codes_scales_and_zero_points(grid):
    q = quantize_rtn(matrix(), grid)
    zeros = 0 if q.zeros is None else q.zeros.numel() * grid.bits
    scales = encode_scales(q)
    whole = 0 if q.global_scale is None else 32
    assert q.size_bits == q.codes.numel() * grid.bits + scales.numel() * 8 * scales.itemsize + zeros + whole


def test_int4_blocks_equal_the_stated_formula():
    """s = 7/amax a block; clamp(round_half_even(w * s), -8, 7) / s; NumPy as the independent implementation."""
    weight = matrix(64, 576)
    q = quantize_rtn(weight, parse("int4-g128-full"))
    padded = np.zeros((64, 640), dtype=np.float32)
    padded[:, :576] = weight.numpy()
    blocks = padded.reshape(64, 5, 128)
    s = np.float32(7) / np.abs(blocks).max(-1, keepdims=True)
    integers = np.clip(np.rint(blocks * s), -8, 7)
    expected = (integers / s).reshape(64, 640)[:, :576]
    assert np.array_equal(integers.reshape(64, 640)[:, :576], q.codes.numpy().astype(np.float32) - 8)
    np.testing.assert_allclose(q.dequantize().numpy(), expected, rtol=3e-7)


def test_int8_per_channel_equals_the_stated_formula():
    weight = matrix(64, 576)
    q = quantize_rtn(weight, parse("int8-channel"))
    s = np.float32(127) / np.abs(weight.numpy()).max(-1, keepdims=True)
    integers = np.clip(np.rint(weight.numpy() * s), -128, 127)
    assert np.array_equal(integers, q.codes.numpy().astype(np.float32) - 128)
    np.testing.assert_allclose(q.dequantize().numpy(), integers / s, rtol=3e-7)


def test_ties_round_to_even():
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert (quantize_rtn(weight, parse("int4-channel-full")).codes - 8.0).tolist() == [[7, 0, 2, 2, 0, -2]]


def test_a_short_last_block_has_the_scale_of_its_own_weights():
    weight = torch.cat([torch.full((1, 128), 7.0), torch.full((1, 64), 0.7)], dim=1)
    assert quantize_rtn(weight, parse("int4-g128-full")).scales.tolist() == [[1.0, pytest.approx(0.1)]]


def test_asymmetric_matches_torch_fake_quantize():
    weight = matrix(8, 64)
    q = quantize_rtn(weight, parse("int8-channel-asym"))
    assert q.zeros is not None
    expected = torch.fake_quantize_per_channel_affine(
        weight, q.scales[:, 0], q.zeros[:, 0].to(torch.int32), axis=0, quant_min=0, quant_max=255
    )
    assert float((q.dequantize() - expected).abs().max()) <= 1e-6


@given(
    bits=st.integers(2, 8),
    codes=st.lists(st.lists(st.integers(0, 255), min_size=7, max_size=7), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_packing_is_undone_by_unpacking(bits, codes):
    array = np.array(codes, dtype=np.uint8) & ((1 << bits) - 1)
    packed = pack(array, bits)
    assert packed.shape == (len(codes), -(-7 * bits // 8))
    assert np.array_equal(unpack(packed, bits, 7), array)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 2, 5, 8, 33])
def test_packed_codes_lie_bit_by_bit_from_the_lowest(bits, columns):
    codes = np.random.default_rng(columns).integers(0, 1 << bits, (3, columns), dtype=np.uint8)
    spread = (codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(3, -1)
    packed = np.packbits(spread, axis=-1, bitorder="little")
    assert np.array_equal(pack(codes, bits), packed)
    assert np.array_equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize(
    "name", ["int4-g128", "int8-channel", "int3-tensor", "int4-g32-asym", "int4-g32-signed", *FLOAT_GRIDS]
)
def test_names_read_back(name):
    assert str(parse(name)) == name


@pytest.mark.parametrize("name", ["int9-g128", "int4-g0", "int4-gx", "fp5", "nvfp4-g16", "int4-g32-asym-half"])
def test_names_that_no_grid_has_are_refused(name):
    with pytest.raises(UsageError):
        parse(name)


def test_a_block_larger_than_a_row_is_refused_by_name():
    with pytest.raises(UsageError, match=r"Blocks of 128 are larger than a row of w \(64 weights\)"):
        check_fits("w", 64, parse("int4-g128"))


def statistics_of(inputs, exact=False):
    if exact:
        return InputStatistics(len(inputs), inputs.abs().mean(0), inputs)
    accumulator = Accumulator(inputs.shape[1], seed=1)
    for part in inputs.split(100):
        accumulator.add(part)
    return accumulator.statistics()


def output_loss(weights, grids, inputs, scales):
    """The slow definition: the mean over tokens of the squared error of all outputs, from the integers."""
    total = 0.0
    for weight, grid in zip(weights, grids, strict=True):
        error = quantize_rtn(weight * scales, grid).dequantize() / scales - weight
        total += float((error.double() @ inputs.sketch.double().T).square().sum())
    return total / inputs.tokens


def skewed_inputs(tokens=3000, columns=96):
    gains = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
    return matrix(tokens, columns, seed=4) * gains


def test_the_sketch_estimates_the_output_error():
    inputs, weight, grid = skewed_inputs(), matrix(64, 96), parse("int4-g32")
    error = quantize_rtn(weight, grid).dequantize() - weight
    exact = float((inputs @ error.T).square().sum()) / len(inputs)
    estimate = output_loss([weight], [grid], statistics_of(inputs), torch.ones(96))
    assert estimate == pytest.approx(exact, rel=0.1)


def test_with_a_row_a_token_the_loss_is_exact():
    inputs, weight, grid = skewed_inputs(200), matrix(16, 96), parse("int4-g32")
    scales = torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.5
    error = quantize_rtn(weight * scales, grid).dequantize() / scales - weight
    exact = float((inputs @ error.T).square().sum()) / 200
    assert output_loss([weight], [grid], statistics_of(inputs, exact=True), scales) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "int4-g32",
        "int3-g128-asym",
        "int4-channel",
        "int4-tensor",
        "int4-g32-signed",
        "nvfp4",
        "mxfp4-even",
        "fp8-tile128",
    ],
)
@pytest.mark.parametrize("rows", [5, 100, 700])
def test_awq_scales_are_the_best_of_all_candidates_by_the_slow_definition(name, rows):
    inputs, grid = statistics_of(skewed_inputs(columns=200)), parse(name)
    weights = [matrix(rows, 200), matrix(32, 200, seed=9)]
    choice = choose_scales(weights, [grid, parse("int8-g32")], inputs)
    losses = []
    for alpha in ALPHAS:
        scales = inputs.magnitude.clamp(min=1e-5).pow(alpha)
        scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(1e-3, 1e3)
        losses.append(output_loss(weights, [grid, parse("int8-g32")], inputs, scales))
    assert choice.loss == pytest.approx(min(losses), rel=1e-5)
    assert choice.plain_loss == pytest.approx(losses[0], rel=1e-5)
    assert losses[ALPHAS.index(choice.alpha)] == pytest.approx(min(losses), rel=1e-5)
    assert choice.loss < (0.9 if name.startswith(("int", "nvfp4")) else 1.0) * choice.plain_loss  # floats gain less


@every_grid
def test_clipping_never_loses_to_the_full_range_on_its_own_loss(grid):
    inputs, weight = statistics_of(skewed_inputs(400, 200), exact=True), matrix(8)
    for seen in (inputs, None):
        clip = choose_clip(weight, grid, None if seen is None else seen.sketch)
        assert clip.shape == grid.scale_shape(*weight.shape)
        moments = torch.eye(200) if seen is None else inputs.sketch.T @ inputs.sketch

        def loss(shares, moments=moments):
            error = quantize_rtn(weight, grid, shares).dequantize() - weight
            total = 0.0
            size = grid.block_size(200)
            for start in range(0, 200, size):
                e, m = error[:, start : start + size], moments[start : start + size, start : start + size]
                total += float(((e @ m) * e).sum())
            return total

        assert loss(clip) <= loss(None) * (1 + 1e-5)


def test_statistics_do_not_depend_on_how_the_stream_is_cut():
    inputs = skewed_inputs(300)
    whole, cut = Accumulator(96, 7), Accumulator(96, 7)
    whole.add(inputs)
    for part in inputs.split(7):
        cut.add(part)
    assert torch.allclose(whole.statistics().sketch, cut.statistics().sketch, atol=1e-4)
    assert torch.allclose(whole.statistics().magnitude, cut.statistics().magnitude)
