"""Tests that stay valid however often one looks: a run may end as soon as each of its rules is decided.

Bounded values (flips, differences of accuracy) are bet on: under 'the mean is not below the margin' a capital that
bets on it being below is a supermartingale, so the chance that it ever reaches 1 / alpha is at most alpha (Ville).
Bets are the approximate Kelly bets of I. Waudby-Smith and A. Ramdas, 'Estimating means of bounded random variables by
betting' (JRSS B 86, 2024, appendix B), each made from earlier values alone and cut where the capital could be lost.

Anything else (KL, log-likelihoods, shares of a tail) is summed by window, and the sums' mean is held against zero with
the one-sided normal mixture of S. Howard et al. (Annals of Statistics 49, 2021; H. Robbins' mixture), with the
variance estimated: an asymptotic confidence sequence as in I. Waudby-Smith et al., 'Time-uniform central limit theory
and asymptotic confidence sequences' (Annals of Statistics 52, 2024, one-sided form). The variance is taken around the
margin, not around the mean: a heavy tail that was not met yet would make the mean small and the variance smaller.
Asymptotic means: valid from some number of windows on, so none is decided before `BURN_IN`;
`benchmarks/sequential.py` shows the false alarms.
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qeval.stats.bootstrap import Floats, finite

Side = Literal["below", "above"]
BURN_IN = 25
"""Windows that are always looked at before a normal mixture may decide."""

EARLY = 0.1
"""The share of all windows at which the mixture is tightest."""

_CUT = 0.75
"""No bet stakes more than this share of the capital."""


@dataclass(frozen=True)
class Decision:
    """On which side of the margin the mean lies, and after how many values (windows) that was certain enough."""

    side: Side
    after: int


def decide_bounded(
    values: ArrayLike, margin: float, alpha: float, *, low: float = 0.0, high: float = 1.0
) -> Decision | None:
    """Return on which side of `margin` the mean of values in [low, high] lies, values [t] as drawn.

    Each side is claimed wrongly with a chance of at most `alpha`, whenever one stops; None while neither is.

    Raises:
        NonFiniteError: some values are NaN or infinite.
        ValueError: some lie outside [low, high], or the margin does not lie inside.
    """
    array = finite(values)
    if not low < margin < high or (array.size and not low <= array.min() <= array.max() <= high):
        raise ValueError(f"Values must lie in [{low}, {high}], and the margin {margin} inside.")
    scaled, point = (array - low) / (high - low), (margin - low) / (high - low)
    below = _first(log_capital(1 - scaled, 1 - point) >= -log(alpha))
    above = _first(log_capital(scaled, point) >= -log(alpha))
    return _earlier(below, above)


def decide_sums(
    excess: ArrayLike, alpha: float, total: int, *, least_variance: float = 0.0, burn_in: int = BURN_IN
) -> Decision | None:
    """Return on which side of zero the mean of `excess` lies: one sum a window of (value - margin) [t], as drawn.

    `total` windows are there in all; `least_variance` is what the variance of a sum is at least taken for, so that
    windows in which nothing happened yet prove nothing. None while neither side is certain enough.
    """
    array = finite(excess)
    count = np.arange(1, array.size + 1)
    mean = array.cumsum() / count
    radius = mixture_radius(count, alpha, max(EARLY * total, burn_in)) * np.sqrt(
        np.maximum((array**2).cumsum() / count, least_variance)
    )
    ready = count >= burn_in
    return _earlier(_first(ready & (mean + radius < 0)), _first(ready & (mean - radius > 0)))


def log_capital(values: Floats, margin: float) -> Floats:
    """Return the log of the capital after each value [t] in [0, 1] of bets that the mean lies above `margin`.

    The stake on value t is (mean - margin) / (variance + (mean - margin)^2) of the values before it, between 0 and
    a share of the capital that no value can take; mean and variance start from one imagined value at the margin.
    """
    before = np.arange(1, values.size + 1)  # the imagined value counts as one
    centred = values - margin
    sums = np.concatenate([[0.0], centred.cumsum()[:-1]])
    squares = np.concatenate([[0.0], (centred**2).cumsum()[:-1]])
    gain = sums / before
    spread = (squares + margin * (1 - margin)) / before  # around the margin: variance + gain^2
    stake = np.clip(gain / spread, 0.0, _CUT / margin)
    return np.asarray(np.log1p(stake * centred).cumsum(), np.float64)


def mixture_radius(count: NDArray[np.int64], alpha: float, tightest: float) -> Floats:
    """Return how far a mean of `count` values of variance 1 ever strays to one side, but with chance `alpha`; [t].

    sqrt(2 (t r^2 + 1) / (t r)^2 log(1 + sqrt(t r^2 + 1) / (2 alpha))), with r such that it is tightest at about
    t = `tightest`.
    """
    level = -2 * log(2 * alpha)
    rho2 = (level + log(level + 1)) / tightest
    grown = count * rho2 + 1
    return np.asarray(np.sqrt(2 * grown / (count**2 * rho2) * np.log1p(np.sqrt(grown) / (2 * alpha))), np.float64)


def _first(reached: NDArray[np.bool_]) -> int | None:
    """Return after how many values it was first true."""
    return int(np.argmax(reached)) + 1 if reached.any() else None


def _earlier(below: int | None, above: int | None) -> Decision | None:
    if below is not None and (above is None or below <= above):
        return Decision("below", below)
    return None if above is None else Decision("above", above)
