"""One-sided bounds of what a gate limits: means, perplexity ratios, shares, paired accuracy, quantiles.

Each is a `Bounded`: a value with a lower and an upper bound held with a stated confidence each, which can also say what
more rows of the same kind would give. A bound is None where the rows cannot support any: fewer than two clusters,
or a quantile farther out than the run has rows. No bound collapses where nothing was seen: a share of zero flips in
280 answers is bounded by what 280 answers can exclude, never by zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, exp, floor, log, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from qeval.stats.bootstrap import NO_INTERVAL, Clusters, Floats, Interval, finite
from qeval.stats.closed import Mean, clustered_mean, critical

POWER = 0.8
_MOST_ROWS = 1e4
"""More than so many times the rows is no advice."""
_SLACK = 1e-9
_HALVINGS = 50


class Bounded(Protocol):
    """A value with bounds."""

    @property
    def value(self) -> float:
        """The estimate."""
        ...

    @property
    def mean(self) -> Mean:
        """The clustered mean that it rests on: rows, clusters, degrees of freedom."""
        ...

    def bounds(self, confidence: float) -> Interval:
        """Return the lower and the upper bound, each held with `confidence`."""
        ...

    def grown(self, factor: float) -> "Bounded":
        """Return what `factor` times as many rows of the same kind would give."""
        ...


@dataclass(frozen=True)
class BoundedMean:
    """A mean of rows that can take any value: KL, a difference of NLL."""

    mean: Mean

    @property
    def value(self) -> float:
        """The mean."""
        return self.mean.value

    def bounds(self, confidence: float) -> Interval:
        """Return Student's t bounds."""
        return self.mean.bounds(confidence)

    def grown(self, factor: float) -> "BoundedMean":
        """Return it with the error of more rows."""
        return BoundedMean(self.mean.grown(factor))


@dataclass(frozen=True)
class BoundedIncrease:
    """exp(mean) - 1: what a mean difference of NLL makes of a perplexity, as a share of the baseline's."""

    mean: Mean

    @property
    def value(self) -> float:
        """The relative increase."""
        return exp(self.mean.value) - 1

    def bounds(self, confidence: float) -> Interval:
        """Return the mean's bounds, carried through the exponential."""
        low, high = self.mean.bounds(confidence)
        return NO_INTERVAL if low is None or high is None else Interval(exp(low) - 1, exp(high) - 1)

    def grown(self, factor: float) -> "BoundedIncrease":
        """Return it with the error of more rows."""
        return BoundedIncrease(self.mean.grown(factor))


@dataclass(frozen=True)
class BoundedShare:
    """The share of rows of which something is true: answers that flip, tokens that agree.

    Bounds: Clopper and Pearson's exact ones on the rows' effective number (E. Korn and B. Graubard, Survey
    Methodology 24, 1998).
    """

    mean: Mean

    @property
    def value(self) -> float:
        """The share."""
        return self.mean.value

    def bounds(self, confidence: float) -> Interval:
        """Return exact bounds, at the effective number of rows."""
        rows = effective_rows(self.mean, confidence)
        return NO_INTERVAL if rows is None else exact_share(self.value * rows, rows, confidence)

    def grown(self, factor: float) -> "BoundedShare":
        """Return it with more rows."""
        return BoundedShare(self.mean.grown(factor))


@dataclass(frozen=True)
class BoundedPart:
    """A mean of values between 0 and `most`, such as the tokens of a continuation before something happens.

    Of all values in that range with a given mean those at its ends vary most, so the bounds are those of a share of
    `most`: never too near, and not collapsing where every value is the same.
    """

    share: BoundedShare
    most: float

    @property
    def value(self) -> float:
        """The mean."""
        return self.share.value * self.most

    @property
    def mean(self) -> Mean:
        """The clustered mean of the values as shares of `most`."""
        return self.share.mean

    def bounds(self, confidence: float) -> Interval:
        """Return the share's bounds, in the values' own unit."""
        low, high = self.share.bounds(confidence)
        return NO_INTERVAL if low is None or high is None else Interval(low * self.most, high * self.most)

    def grown(self, factor: float) -> "BoundedPart":
        """Return it with more rows."""
        return replace(self, share=self.share.grown(factor))


@dataclass(frozen=True)
class BoundedDrop:
    """Accuracy lost: the share of answers that turned wrong less the share that turned right.

    Bounds: T. Tango's score bounds for paired proportions (Statistics in Medicine 17, 1998) on the effective number of
    rows; with no answer changed in n the upper one is z^2 / (n + z^2), not zero.
    """

    mean: Mean
    lost: float
    gained: float

    @property
    def value(self) -> float:
        """The drop, as a share of all questions."""
        return self.lost - self.gained

    def bounds(self, confidence: float) -> Interval:
        """Score bounds, at the effective number of rows."""
        rows = effective_rows(self.mean, confidence)
        return NO_INTERVAL if rows is None else paired_drop(self.lost, self.gained, rows, confidence)

    def grown(self, factor: float) -> "BoundedDrop":
        """Return it with more rows."""
        return replace(self, mean=self.mean.grown(factor))


@dataclass(frozen=True, eq=False)
class BoundedQuantile:
    """A quantile, as W. Woodruff bounds it (JASA 47, 1952): through the share of rows above it.

    `ascending` [rows] holds the values; `mean` is that of 'lies above the quantile', clustered. The bounds are values
    that were seen, so they hold for any distribution.
    """

    ascending: Floats
    level: float
    mean: Mean

    @cached_property
    def value(self) -> float:
        """The smallest value with at least `level` of all rows at or below it."""
        return float(self.ascending[_rank(self.level, len(self.ascending))])

    def bounds(self, confidence: float) -> Interval:
        """Return the smallest value that the quantile is confidently not above, and the largest it is not below."""
        rows = effective_rows(self.mean, confidence)
        if rows is None:
            return NO_INTERVAL
        share = 1 - self.level
        few, many = _most_above(share, rows, confidence), _fewest_above(share, rows, confidence)
        count = len(self.ascending)
        high = None if few is None else float(self.ascending[max(count - 1 - floor(few / rows * count + _SLACK), 0)])
        low = None if many is None else float(self.ascending[max(count - ceil(many / rows * count - _SLACK), 0)])
        return Interval(low, high)

    def grown(self, factor: float) -> "BoundedQuantile":
        """Return it with the same distribution of more rows."""
        return replace(self, mean=self.mean.grown(factor))


def mean_of(values: ArrayLike, clusters: Clusters) -> BoundedMean:
    """Return a mean of any values [rows]."""
    return BoundedMean(clustered_mean(values, clusters))


def increase_of(nll_differences: ArrayLike, clusters: Clusters) -> BoundedIncrease:
    """Return a perplexity's relative increase, from paired differences of NLL in nats [rows]."""
    return BoundedIncrease(clustered_mean(nll_differences, clusters))


def share_of(happened: ArrayLike, clusters: Clusters) -> BoundedShare:
    """Return the share of rows [rows] that are true; a row may be true in part."""
    return BoundedShare(clustered_mean(happened, clusters))


def part_of(shares: ArrayLike, clusters: Clusters, most: float) -> BoundedPart:
    """Return a mean of values from 0 to `most`, from what share of it each of them [rows] is."""
    return BoundedPart(share_of(shares, clusters), most)


def drop_of(right_before: ArrayLike, right_now: ArrayLike, clusters: Clusters) -> BoundedDrop:
    """Return the drop of accuracy, from what was right before and is right now, each 0 or 1 [rows]."""
    before, now = finite(right_before), finite(right_now)
    change = before - now
    return BoundedDrop(clustered_mean(change, clusters), float((change > 0).mean()), float((change < 0).mean()))


def quantile_of(values: ArrayLike, level: float, clusters: Clusters) -> BoundedQuantile:
    """Return a quantile of values [rows]."""
    array = finite(values)
    ascending = np.sort(array)
    point = ascending[_rank(level, array.size)]
    return BoundedQuantile(ascending, level, clustered_mean(array > point, clusters))


def effective_rows(mean: Mean, confidence: float) -> float | None:
    """Return how many independent rows would tell as much: n / design effect, less for few clusters, at most n.

    The factor (t[n - 1] / t[freedom])^2 is Korn and Graubard's. Rows that do not vary show no design effect.
    """
    effect = mean.design_effect
    if effect is None or mean.freedom is None or mean.n < 2:
        return None
    few = critical(confidence, mean.n - 1) / critical(confidence, mean.freedom)
    return mean.n / max(effect, 1.0) * min(few, 1.0) ** 2


def exact_share(count: float, rows: float, confidence: float) -> Interval:
    """Return Clopper and Pearson's bounds of a share, `count` of `rows` (Biometrika 26, 1934); both may be fractions.

    >>> exact_share(0, 280, 0.95).high < 0.0107
    True
    """
    low = float(special.betaincinv(count, rows - count + 1, 1 - confidence)) if count > 0 else 0.0
    high = float(special.betaincinv(count + 1, rows - count, confidence)) if count < rows else 1.0
    return Interval(low, high)


def paired_drop(lost: float, gained: float, rows: float, confidence: float) -> Interval:
    """Return Tango's score bounds of lost - gained, both shares of `rows` pairs."""
    z = float(special.ndtri(confidence))

    def score(drop: float) -> float:
        return _tango(lost, gained, rows, drop)

    value = lost - gained
    return Interval(_root(lambda d: score(d) - z, -1.0, value), _root(lambda d: score(d) + z, value, 1.0))


def smallest_effect(of: Bounded, confidence: float, power: float = POWER) -> float | None:
    """Return the smallest distance from a margin that rows like these decide with `power`, in the value's unit.

    For a mean it is (t[confidence] + t[power]) standard errors; where the bound is not a t bound its own reach stands
    for t[confidence] standard errors.
    """
    high, freedom = of.bounds(confidence).high, of.mean.freedom
    if high is None or freedom is None:
        return None
    return (high - of.value) * (1 + critical(power, freedom) / critical(confidence, freedom))


def factor_to_decide(
    of: Bounded, margin: float, confidence: float, more: Callable[[float], Bounded] | None = None
) -> float | None:
    """Return how many times as many rows would put one bound past `margin`, the value staying what it is.

    None where even ten thousand times as many would not. `more` gives what a factor of something else than rows gives.
    """
    grown = more or of.grown

    def decided(factor: float) -> bool:
        low, high = grown(factor).bounds(confidence)
        return (high is not None and high <= margin) or (low is not None and low > margin)

    if not decided(_MOST_ROWS):
        return None
    few, many = 0.0, log(_MOST_ROWS)
    while many - few > 1e-3:
        middle = (few + many) / 2
        few, many = (few, middle) if decided(exp(middle)) else (middle, many)
    return exp(many)


def _tango(lost: float, gained: float, rows: float, drop: float) -> float:
    """Return the score statistic of the null 'the drop is `drop`', 0 at the estimate; falls as `drop` grows."""
    a = 2.0
    b = -(lost + gained) + (2 - lost + gained) * drop
    c = -gained * drop * (1 - drop)
    gained_null = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = (2 * gained_null + drop * (1 - drop)) / rows
    distance = lost - gained - drop
    return 0.0 if distance == 0 else distance / sqrt(max(variance, 1e-300))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function crosses zero; the end it does not reach otherwise."""
    if function(low) <= 0:
        return low
    return high if function(high) >= 0 else _bisect(function, low, high)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function, above zero at `low` and not at `high`, crosses it, almost to the last bit."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def _most_above(share: float, rows: float, confidence: float) -> float | None:
    """Return how many of `rows` may lie above a value that the quantile is then confidently not above."""

    def excess(count: float) -> float:
        return (exact_share(count, rows, confidence).high or 0.0) - share

    return None if excess(0.0) > 0 else _bisect(lambda count: -excess(count), 0.0, rows * share)


def _fewest_above(share: float, rows: float, confidence: float) -> float | None:
    """Return how many of `rows` must lie at or above a value that the quantile is then confidently not below."""

    def lack(count: float) -> float:
        return (exact_share(count, rows, confidence).low or 0.0) - share

    return None if lack(rows) < 0 else _bisect(lambda count: -lack(count), rows * share, rows)


def _rank(level: float, rows: int) -> int:
    """Return the index of the smallest of `rows` ascending values with at least `level` of them at or below it."""
    return max(ceil(level * rows - _SLACK), 1) - 1
