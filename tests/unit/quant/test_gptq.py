"""GPTQ against the paper's own words, in a plain loop over an explicit inverse, and what it owes on every grid."""

from dataclasses import replace

import pytest
import torch

from qeval.errors import QevalError
from qeval.quant.awq import choose_clip
from qeval.quant.elements import element_values
from qeval.quant.gptq import factorize, quantize_gptq
from qeval.quant.grid import FLOAT_GRIDS, FloatGrid, Grid, PerBlock, PerChannel, PerTensor, parse
from qeval.quant.qweight import to_blocks
from qeval.quant.rtn import quantize_rtn as plainly
from qeval.quant.rtn import steps_of

GRIDS = [
    Grid(bits, granularity, symmetric)
    for bits in (3, 4, 8)
    for granularity in (PerBlock(32), PerBlock(128), PerChannel(), PerTensor())
    for symmetric in (True, False)
]
GRIDS += [Grid(4, PerBlock(32), span="signed"), Grid(4, PerBlock(32), span="half")]
FLOATS = [FLOAT_GRIDS[name] for name in ("nvfp4", "nvfp4-46", "mxfp4-rceil", "fp8-tile128", "fp8-tensor", "nf4")]
every_grid = pytest.mark.parametrize("grid", [*GRIDS, *FLOATS], ids=str)
COLUMNS = 150
"""More than a lazy batch, and neither 32 nor 128 divides it."""


def normal(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments_of(inputs):
    return inputs.T @ inputs / len(inputs)


def correlated_moments(columns=COLUMNS, tokens=400, seed=1):
    mixing = normal(columns, columns, seed) / columns**0.5
    gains = torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    return moments_of((normal(tokens, columns, seed + 1) @ (mixing + torch.eye(columns))) * gains)


def the_slow_way(weight, grid, moments, damping, act_order):
    """Optimal brain quantization, one column at a time with the whole inverse updated (arXiv 2210.17323, section 3)."""
    rows, columns = weight.shape
    steps = steps_of(to_blocks(weight, grid), grid)
    left, h = weight.double().clone(), moments.double().clone()
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(columns))
    h[dead, dead] = mean
    inverse = torch.linalg.inv(h + damping * mean * torch.eye(columns, dtype=torch.float64))
    codes = torch.zeros(rows, columns)
    table = torch.tensor(element_values(grid.element)) if isinstance(grid, FloatGrid) else None
    for j in order:
        block = j // grid.block_size(columns)
        step, scale, zero = (part.expand(rows, -1)[:, block] for part in steps[:3])
        if table is None:
            codes[:, j] = ((left[:, j].float() * step).round() + zero).clamp(0, grid.levels)
            values = (codes[:, j] - zero).double() * scale
        else:
            gaps = (table - (left[:, j].float() / scale).unsqueeze(1)).abs().nan_to_num(nan=torch.inf)
            codes[:, j] = gaps.argmin(1).float()
            values = table[codes[:, j].long()].double() * scale
        error = left[:, j] - values
        left -= torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # done with: its row and column are zero but for rounding
    return codes


def true_loss(values, weight, moments):
    error = (values - weight).double()
    return float(((error @ moments.double()) * error).sum())


@pytest.mark.parametrize("act_order", [True, False])
@every_grid
def test_codes_are_those_of_the_plain_loop(grid, act_order):
    weight, moments = normal(24, COLUMNS, 0), correlated_moments()
    expected = the_slow_way(weight, grid, moments, 0.01, act_order)
    found = quantize_gptq(weight, grid, factorize(moments, damping=0.01, act_order=act_order))
    plain = plainly(weight, grid).codes
    own = (found.weight.codes != plain).any(1)  # the other rows were kept plain
    assert int((~own).sum()) == found.plain_rows
    assert int(own.sum()) >= 12
    told = replace(found.weight, codes=expected.to(torch.uint8)).dequantize()  # a small float has two zeros
    same = (found.weight.dequantize() == told)[own]
    assert float(same.float().mean()) > 0.998  # an error of 1e-7 may turn a tie, and all that comes after it in a row
    assert int(same.all(1).sum()) >= 0.9 * len(same)


@every_grid
def test_no_row_loses_to_plain_rounding_on_the_moments_it_saw(grid):
    weight, moments = normal(16, COLUMNS, 3), correlated_moments(seed=5)
    found = quantize_gptq(weight, grid, factorize(moments, damping=0.01, act_order=True))
    plain = plainly(weight, grid)
    assert torch.equal(found.weight.scales, plain.scales)
    values = found.weight.dequantize()
    for row in range(16):
        part = slice(row, row + 1)
        mine, theirs = (true_loss(v[part], weight[part], moments) for v in (values, plain.dequantize()))
        assert mine <= theirs * (1 + 1e-4)
    assert found.loss == pytest.approx(true_loss(values, weight, moments), rel=1e-3)
    assert found.plain_loss == pytest.approx(true_loss(plain.dequantize(), weight, moments), rel=1e-3)


@every_grid
def test_a_searched_range_is_kept_and_no_row_loses_to_its_plain_rounding(grid):
    weight, moments = normal(16, COLUMNS, 3), correlated_moments(seed=5)
    factor = factorize(moments, damping=0.01, act_order=True)
    clip = choose_clip(weight, grid, factor.sketch)
    found, plain = quantize_gptq(weight, grid, factor, clip), plainly(weight, grid, clip)
    assert torch.equal(found.weight.scales, plain.scales)
    mine, theirs = (true_loss(q.dequantize(), weight, moments) for q in (found.weight, plain))
    assert mine <= theirs * (1 + 1e-4)


def test_correlated_inputs_gain_much():
    found = quantize_gptq(
        normal(64, COLUMNS, 3), parse("int4-g32"), factorize(correlated_moments(), damping=0.01, act_order=True)
    )
    assert found.loss < 0.8 * found.plain_loss


@every_grid
def test_uncorrelated_inputs_are_rounded_plainly(grid):
    weight, moments = normal(8, COLUMNS, 7), torch.diag(torch.linspace(0.1, 3, COLUMNS))
    found = quantize_gptq(weight, grid, factorize(moments, damping=0.01, act_order=True))
    assert torch.equal(found.weight.codes, plainly(weight, grid).codes)


def test_a_column_that_no_token_reached_is_rounded_plainly_and_moves_no_other():
    weight, moments = normal(8, COLUMNS, 7), correlated_moments()
    dead = torch.tensor([3, 40, COLUMNS - 1])
    moments[dead], moments[:, dead] = 0.0, 0.0
    alive = torch.tensor([c for c in range(COLUMNS) if c not in dead.tolist()])
    grid = parse("int4-channel")
    found = quantize_gptq(weight, grid, factorize(moments, damping=0.01, act_order=True))
    assert torch.equal(found.weight.codes[:, dead], plainly(weight, grid).codes[:, dead])
    weight[:, dead] = 0.0
    again = quantize_gptq(weight, grid, factorize(moments, damping=0.01, act_order=True))
    same = found.weight.scales[:, 0] == again.weight.scales[:, 0]
    assert bool(same.any())
    assert torch.equal(found.weight.codes[same][:, alive], again.weight.codes[same][:, alive])


def test_a_batch_boundary_and_the_order_of_reading_leave_no_trace(monkeypatch):
    weight, moments, grid = normal(16, COLUMNS, 9), correlated_moments(), parse("int4-g32")
    factor = factorize(moments, damping=0.01, act_order=False)
    lazy = quantize_gptq(weight, grid, factor).weight.codes
    monkeypatch.setattr("qeval.quant.gptq._COLUMNS_AT_ONCE", 7)
    assert float((quantize_gptq(weight, grid, factor).weight.codes == lazy).float().mean()) > 0.998


def test_the_factor_is_what_it_says():
    moments = correlated_moments()
    for act_order in (True, False):
        factor = factorize(moments, damping=0.05, act_order=act_order)
        damped = moments[factor.order][:, factor.order] + torch.diag(factor.added).float()
        assert torch.allclose(factor.root @ factor.root.T, damped, atol=1e-5)
        assert torch.allclose(
            factor.sketch.T @ factor.sketch
            - torch.diag(factor.added).float()[factor.order.argsort()][:, factor.order.argsort()],
            moments,
            atol=1e-5,
        )
        assert torch.allclose(factor.upper @ factor.root, torch.eye(COLUMNS), atol=1e-4)
        assert factor.damping == 0.05
    assert torch.equal(factor.order, torch.arange(COLUMNS))
    assert bool((moments.diagonal()[factorize(moments, damping=0.1, act_order=True).order].diff() <= 0).all())


def test_fewer_tokens_than_columns_are_damped_not_refused():
    factor = factorize(moments_of(normal(20, COLUMNS, 1)), damping=0.01, act_order=True)
    assert factor.damping == 0.01
    assert bool(torch.isfinite(factor.upper).all())


def test_damping_is_raised_as_stated_and_said():
    broken = torch.eye(4)
    broken[0, 1] = broken[1, 0] = 1.05  # an eigenvalue of -0.05, as no true moments have
    assert factorize(broken, damping=0.01, act_order=True).damping == pytest.approx(0.1)


def test_moments_that_cannot_be_used_are_refused():
    hopeless = torch.eye(4)
    hopeless[0, 1] = hopeless[1, 0] = 9.0
    with pytest.raises(QevalError, match="not positive definite even when damped"):
        factorize(hopeless, damping=0.01, act_order=True)
    with pytest.raises(QevalError, match="not finite"):
        factorize(torch.full((3, 3), torch.inf), damping=0.01, act_order=True)


def test_nothing_given_is_touched():
    weight, moments = normal(4, COLUMNS, 0), correlated_moments()
    before = weight.clone(), moments.clone()
    factor = factorize(moments, damping=0.01, act_order=True)
    upper = factor.upper.clone()
    quantize_gptq(weight, parse("int4-g32"), factor)
    assert torch.equal(weight, before[0])
    assert torch.equal(moments, before[1])
    assert torch.equal(factor.upper, upper)
