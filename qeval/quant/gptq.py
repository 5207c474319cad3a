"""GPTQ: round a matrix's columns one after the other, each column's error made good by the columns still to come.

Frantar, Ashkboos, Hoefler, Alistarh, *GPTQ*, arXiv 2210.17323, algorithm 1. With H the second moments of the input
and U the upper Cholesky factor of its inverse (H^-1 = U^T U), column j's error e_j = (w_j - q_j) / U_jj is taken from
the later columns as e_j U_jk; then W - Q = E U, and the output's squared error tr((W - Q) H (W - Q)^T) is |E|^2.

Three choices, stated once. The steps (scales and zero points) of every block are those of the float weights, found
before the first column moves ("static groups"), so columns may go in any order and the layout stays the usual one.
Act-order, the default: columns with the largest second moment go first. A row for which plain rounding has the
smaller error keeps it, so no row ever loses to round-to-nearest on the text that it was calibrated on.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.arithmetic import sum_dtype, with_fp64
from qeval.errors import QevalError
from qeval.quant.grid import FloatGrid, WeightGrid
from qeval.quant.qweight import QWeight, to_blocks
from qeval.quant.rtn import Steps, encode_points, qweight_of, round_scaled, steps_of
from qeval.quant.rtn import quantize_rtn as quantize_plainly

_RAISE, _LARGEST_DAMPING = 10.0, 1.0
_COLUMNS_AT_ONCE = 32
"""Columns that are rounded one by one before their errors reach the others in one product."""
_SMALL_TRIANGLE = 64
"""The triangle whose inverse is solved for."""


@dataclass(frozen=True, eq=False)
class Factor:
    """The factors of an input's second moments H, in the order in which the columns are rounded.

    `order` [columns]: their indices. `added` [columns] is what H's diagonal was raised by: damping, and the mean of
    the others for columns that no token reached. `root` and `upper` [columns, columns] fp32, both upper triangles:
    H + diag(added) = root root^T, and upper = root^-1. `damping`: as a share of the mean second moment.
    """

    order: Tensor
    added: Tensor
    root: Tensor
    upper: Tensor
    damping: float

    @property
    def sketch(self) -> Tensor:
        """S [columns, columns] with S^T S = H + diag(added), the columns where they belong."""
        sketch = torch.empty_like(self.root)
        sketch[:, self.order] = self.root.T
        return sketch


class Rounded(NamedTuple):
    """A quantized matrix, and the squared error of all its outputs, mean over tokens: its own and plain rounding's.

    `plain_rows`: how many rows are rounded plainly.
    """

    weight: QWeight
    loss: float
    plain_loss: float
    plain_rows: int


def factorize(moments: Tensor, *, damping: float, act_order: bool) -> Factor:
    """Factorize the second moments of an input; fp64 inside.

    A column that no token reached (its moment is 0) takes the mean of the others, so that it is rounded plainly and
    moves no other.

    Args:
        moments: [columns, columns], the mean over tokens of x x^T.
        damping: The share of the mean second moment that is added to every one. Where the damped matrix is not
            positive definite, it is multiplied by 10 until it is, up to 1; the result says which it was.
        act_order: Whether the columns with the largest moments go first.

    Raises:
        QevalError: The moments are not finite, or no damping helps.
    """
    device, moments = moments.device, with_fp64(moments)
    diagonal = moments.diagonal().double()
    if not bool(torch.isfinite(moments).all()):
        raise QevalError("The calibration text gives inputs whose second moments are not finite; GPTQ can't use them.")

    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(dead), device=dead.device)

    # damp until the matrix is positive definite
    while True:
        added = (dead.double() * mean + damping * mean)[order]
        damped = moments.double()[order][:, order]
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            break
        damping *= _RAISE
        if damping > _LARGEST_DAMPING:
            raise QevalError("GPTQ's second moments are not positive definite even when damped by their own mean.")

    root = lower.flip(0, 1)
    upper = _inverse(root).float().to(device)
    return Factor(order.to(device), added.float().to(device), root.float().to(device), upper, damping)


def quantize_gptq(weight: Tensor, grid: WeightGrid, factor: Factor, clip: Tensor | None = None) -> Rounded:
    """Quantize a matrix with the second moments of its input taken into account.

    Args:
        weight: [rows, columns] fp32.
        grid: Its grid.
        factor: Of the input's second moments.
        clip: Of the scales' shape with values in (0, 1]: shrinks the range of each block.
    """
    steps = steps_of(to_blocks(weight, grid), grid, clip)
    plain = quantize_plainly(weight, grid, clip)
    columns = _Columns(weight, grid, steps, factor)
    columns.round(0, weight.shape[1])
    codes = columns.codes_by_row()

    # what damping adds to the diagonal is no loss
    damped = columns.errors.square_().sum(0, dtype=sum_dtype(weight.device))
    loss = damped - _added_loss(weight - qweight_of(codes, steps, grid).dequantize(), factor)
    plain_loss = _loss(weight - plain.dequantize(), factor)

    # no row loses to plain rounding
    loses = plain_loss <= loss
    return Rounded(
        qweight_of(torch.where(loses.unsqueeze(1), plain.codes, codes), steps, grid),
        float(torch.minimum(loss, plain_loss).sum()),
        float(plain_loss.sum()),
        int((loses & (codes != plain.codes).any(1)).sum()),
    )


class _Columns:
    """A matrix on its way to codes: its columns in the factor's order, as contiguous rows [columns, rows]."""

    def __init__(self, weight: Tensor, grid: WeightGrid, steps: Steps, factor: Factor) -> None:
        rows, columns = weight.shape
        self._left = weight.T[factor.order].contiguous()
        self._points, self.errors = torch.empty_like(self._left), torch.empty_like(self._left)
        self._steps = [part.expand(rows, -1).T for part in (steps.inverse, steps.scales, steps.zeros)]  # [blocks, rows]
        self._block_of = factor.order // grid.block_size(columns)
        self._grid, self._factor = grid, factor
        self._pivots: list[float] = factor.upper.diagonal().tolist()  # read once: each read waits for the device

    def round(self, start: int, stop: int) -> None:
        """Round the columns `start` to `stop`, all before them being done.

        The errors of one half are taken from the other in one product, and so on by halves: the paper's lazy batches,
        at every size, so that the work is matrix products whatever the width.
        """
        if stop - start <= _COLUMNS_AT_ONCE:
            self._round_few(slice(start, stop))
            return

        middle = (start + stop) // 2
        self.round(start, middle)
        upper = self._factor.upper[start:middle, middle:stop]
        self._left[middle:stop].addmm_(upper.T, self.errors[start:middle], alpha=-1)
        self.round(middle, stop)

    def _round_few(self, part: slice) -> None:
        """Round the columns of `part` one by one, each one's error taken from those after it."""
        left, points, errors = self._left[part], self._points[part], self.errors[part]
        upper = self._factor.upper[part, part]
        inverse, scales, zeros = (values[self._block_of[part]] for values in self._steps)
        for column, pivot in enumerate(self._pivots[part]):
            point = points[column]
            if isinstance(self._grid, FloatGrid):
                point.copy_(round_scaled(left[column], inverse[column], scales[column], self._grid))
            else:
                torch.mul(left[column], inverse[column], out=point)
                point.round_().add_(zeros[column]).clamp_(0, self._grid.levels)
            error = torch.sub(point, zeros[column], out=errors[column]).mul_(scales[column])
            error.sub_(left[column]).div_(-pivot)
            left[column + 1 :].addr_(upper[column, column + 1 :], error, alpha=-1)

    def codes_by_row(self) -> Tensor:
        """Return the codes [rows, columns] uint8, the columns where they belong."""
        codes = torch.empty(self._points.T.shape, dtype=torch.uint8, device=self._points.device)
        codes[:, self._factor.order] = encode_points(self._points, self._grid).T
        return codes


def _loss(errors: Tensor, factor: Factor) -> Tensor:
    """Return the squared error of each row's output, mean over tokens [rows] fp64, from errors [rows, columns]."""
    damped = (errors[:, factor.order] @ factor.root).square_().sum(1, dtype=sum_dtype(errors.device))
    return damped - _added_loss(errors, factor)


def _added_loss(errors: Tensor, factor: Factor) -> Tensor:
    """Return what the raised diagonal alone adds to each row's loss [rows] fp64."""
    return errors[:, factor.order].square_() @ factor.added


def _inverse(root: Tensor) -> Tensor:
    """Invert an upper triangle by halves: a third of the arithmetic of solving for it, all in products."""
    size = len(root)
    if size <= _SMALL_TRIANGLE:
        solved: Tensor = torch.linalg.solve_triangular(
            root, torch.eye(size, dtype=root.dtype, device=root.device), upper=True
        )
        return solved
    half = size // 2
    first, last = _inverse(root[:half, :half]), _inverse(root[half:, half:])
    inverse = torch.zeros_like(root)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ root[:half, half:]) @ last
    return inverse
