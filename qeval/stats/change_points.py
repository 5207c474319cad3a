"""The point where a series of figures changes its level, with an exact false-alarm rate.

If nothing changed, the order of the runs says nothing: every order of the same values is as likely. The statistic is
the largest standardized difference of means over all places to cut the series in two (E. Page's problem of one change,
Biometrika 41, 1954), and its p-value the share of orders that give one as large (a permutation test, so it holds for
any distribution of the values).
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from qeval.stats.bootstrap import Floats, finite

FEWEST_RUNS = 6
"""Of fewer values no order is rare enough to tell: of 6 the rarest cut in halves has p = 0.1."""
DRAWS = 9_999
_SLACK = 1e-12


@dataclass(frozen=True)
class ChangePoint:
    """The likeliest change of a series: `place` counts the values before it; `before` and `after` are the means."""

    place: int
    before: float
    after: float
    p_value: float


def change_point(values: ArrayLike, seed: int = 0) -> ChangePoint | None:
    """Return the likeliest change of level; None where there are fewer than `FEWEST_RUNS` values.

    Args:
        values: Figures in the order of time, [runs].
        seed: Of the orders that are drawn.

    Raises:
        NonFiniteError: some are NaN or infinite.
    """
    series = finite(values)
    if series.size < FEWEST_RUNS:
        return None
    cuts = _cuts(series[None])[0]
    place = int(cuts.argmax()) + 1

    # the order that was seen is one of those that count, so no p-value is 0
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(series, (DRAWS, 1)), axis=1)
    scale = float(np.ptp(series)) or 1.0
    as_large = int((_cuts(orders).max(axis=1) >= cuts.max() - _SLACK * scale).sum())
    return ChangePoint(place, float(series[:place].mean()), float(series[place:].mean()), (as_large + 1) / (DRAWS + 1))


def _cuts(series: Floats) -> Floats:
    """Return sqrt(k (n - k) / n) times the distance of the means on both sides of each cut, [series, n - 1]."""
    count = series.shape[1]
    before = np.arange(1, count)
    sums = series.cumsum(axis=1)
    first = sums[:, :-1] / before
    rest = (sums[:, -1:] - sums[:, :-1]) / (count - before)
    return np.asarray(np.abs(rest - first) * np.sqrt(before * (count - before)) / sqrt(count), np.float64)
