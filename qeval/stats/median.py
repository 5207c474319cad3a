"""The median of repeats with its interval, and the ratio of two medians.

The interval of a median is of order statistics (H. A. David and H. N. Nagaraja, "Order Statistics", 3rd ed., section
7.1): between the k-th smallest and the k-th largest of n independent repeats the true median lies with probability
1 - 2 P(Binomial(n, 1/2) < k), whatever their distribution. The k taken is the largest that keeps the level, so that the
interval covers at least what it says; `FEWEST` repeats are the least that any k keeps it with.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats has the same functions, and takes half a second to import

from qeval.stats.bootstrap import LEVEL, NO_INTERVAL, Floats, Interval, finite, interval, weights
from qeval.types import Better, Estimate

FEWEST = 6
"""Repeats below which a median has no interval of 95 %: of five, the smallest and the largest hold it in 93.75 %."""


def median(values: ArrayLike, *, unit: str, better: Better) -> Estimate:
    """Return the median of independent repeats [repeats]; no value of none, no interval below `FEWEST`.

    >>> median([3.0, 1.0, 2.0, 5.0, 4.0, 9.0], unit="s", better="lower")
    Estimate(value=3.5, low=1.0, high=9.0, unit='s', better='lower', n=6, clusters=6)

    Raises:
        NonFiniteError: some values are NaN or infinite.
    """
    array = finite(values)
    if not array.size:
        return Estimate(None, None, None, unit, better, 0, 0)
    ends = order_interval(array)
    return Estimate(float(np.median(array)), ends.low, ends.high, unit, better, array.size, array.size)


def order_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the narrowest symmetric pair of order statistics that holds the median with at least `level`, if any does.

    >>> order_interval(range(1, 11))
    Interval(low=2.0, high=9.0)
    """
    ordered = np.sort(finite(values))
    cut = _cut(ordered.size, level)
    return Interval(float(ordered[cut - 1]), float(ordered[-cut])) if cut else NO_INTERVAL


def half_width(estimate: Estimate) -> float | None:
    """Return half of an interval's length as a share of its median, None without one; it says when to stop."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / (2 * abs(estimate.value)) if estimate.value else None


def median_ratio(values: ArrayLike, base: ArrayLike, *, better: Better, seed: int) -> Estimate:
    """Return the median of `values` over the median of `base`, both [their own repeats], resampled apart.

    `n` counts the repeats of the side that has fewer, by which the bootstrap's interval is widened; below `FEWEST`
    there is none. Repeats of both sides are taken as independent: a machine that drifts moves both where their runs
    were interleaved, which makes the interval wider than it need be.

    Raises:
        NonFiniteError: some values are NaN or infinite.
    """
    top, bottom = finite(values), finite(base)
    fewer = min(top.size, bottom.size)
    if not fewer or not np.median(bottom):
        return Estimate(None, None, None, "ratio", better, fewer, fewer)
    value = float(np.median(top) / np.median(bottom))
    ends = NO_INTERVAL
    if fewer >= FEWEST:
        ends = interval(_medians(top, seed) / _medians(bottom, seed + 1), fewer)
    return Estimate(value, ends.low, ends.high, "ratio", better, fewer, fewer)


def _cut(count: int, level: float) -> int:
    """Return the largest k with 2 P(Binomial(count, 1/2) < k) <= 1 - level; 0 where there is none."""
    below = special.bdtr(np.arange(count // 2), count, 0.5)  # P(X <= k - 1) for k = 1, 2, ...
    return int(np.count_nonzero(2 * below <= 1 - level))


def _medians(values: Floats, seed: int) -> Floats:
    """Return the medians of bootstrap resamples, [resamples]: of an even count the mean of the two middle ones."""
    ordered, upto = np.sort(values), weights(values.size, seed).cumsum(axis=1)
    middle = ((values.size + 1) // 2, values.size // 2 + 1)  # ranks from 1, equal for an odd count
    lower, upper = (ordered[(upto < rank).sum(axis=1)] for rank in middle)
    return np.asarray((lower + upper) / 2, np.float64)
