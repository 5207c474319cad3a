"""The cluster bootstrap: whole clusters (windows, subjects) are drawn with replacement, never single rows.

Tokens of a window, and questions of a subject, resemble one another; an interval that takes them as
independent is too narrow. A statistic that is a ratio of sums needs only the sums of each cluster, so one
matrix product of weights [resamples, clusters] and sums gives every resample, however many rows there are.
Quantiles come from the same weights, exactly (see `quantile_resamples`).

The interval is the *expanded percentile* interval (T. Hesterberg, "What Teachers Should Know about the
Bootstrap", 2015): the percentile interval at the level that makes up for the bootstrap's narrowness with few
clusters, alpha/2 = Phi(-sqrt(n / (n - 1)) t[1 - 0.05/2, n - 1]). For heavy-tailed means of 4 to 16 clusters
it covers the truth more often than the plain percentile interval (`tests/unit/stats/test_coverage.py`), and
more often than BCa, which mends skewness but not narrowness; from about a hundred clusters on all agree.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # scipy.stats has the same functions, and takes half a second to import

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.95
RESAMPLES = 2000
METHOD = "95 %, bootstrap clustered by window or subject"
FEW_CLUSTERS = 10
"""With fewer clusters than this an interval is a rough guide, and a report says so."""

_UINT16 = 1 << 16
_RANK_SLACK = 1e-9  # so that 0.9 * 10 is rank 9 whatever its last bit


class NonFiniteError(ValueError):
    """Some values are NaN or infinite: counted here, never averaged away."""

    def __init__(self, count: int, total: int) -> None:
        """`count` of `total` values are not finite."""
        super().__init__(f"{count} of {total} values are not finite.")
        self.count = count
        self.total = total


class Interval(NamedTuple):
    """The two ends of an interval, both None where fewer than two clusters leave it undefined."""

    low: float | None
    high: float | None


NO_INTERVAL = Interval(None, None)


@dataclass(frozen=True, eq=False)
class Clusters:
    """The cluster of each row: `ids` [rows] count from 0 to `count` - 1, none of them empty."""

    ids: Ints
    count: int

    @classmethod
    def of(cls, labels: Sequence[Hashable] | NDArray[np.generic]) -> "Clusters":
        """Return the clusters that equal labels (windows, subjects) make, in the labels' order.

        >>> Clusters.of(["law", "anatomy", "law"]).ids.tolist()
        [1, 0, 1]
        """
        distinct, ids = np.unique(np.asarray(labels), return_inverse=True)
        return cls(ids.astype(np.int64).ravel(), len(distinct))

    @classmethod
    def single_rows(cls, rows: int) -> "Clusters":
        """Return every row a cluster of its own."""
        return cls(np.arange(rows, dtype=np.int64), rows)

    def sums(self, values: ArrayLike) -> Floats:
        """Return the sum of each cluster's values, [clusters]."""
        summed = np.bincount(self.ids, weights=np.asarray(values, np.float64), minlength=self.count)
        return np.asarray(summed, np.float64)

    def sizes(self) -> Floats:
        """Return how many rows each cluster has, [clusters]."""
        return np.asarray(np.bincount(self.ids, minlength=self.count), np.float64)

    def select(self, rows: NDArray[np.bool_]) -> "Clusters":
        """Return the clusters of some of the rows; a cluster that loses all its rows is gone."""
        return Clusters.of(self.ids[rows])


@lru_cache(maxsize=8)
def weights(clusters: int, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Return how often each resample draws each cluster, [resamples, clusters], read-only.

    The same (clusters, seed) gives the same draws, so that variants are resampled together.
    """
    generator = np.random.default_rng([seed, clusters])
    picks = generator.integers(clusters, size=(resamples, clusters))
    cells = (picks + np.arange(resamples)[:, None] * clusters).ravel()
    counts = np.bincount(cells, minlength=resamples * clusters).reshape(resamples, clusters)
    drawn = counts.astype(np.float64)
    drawn.setflags(write=False)
    return drawn


def interval(resampled: Floats, clusters: int, level: float = LEVEL) -> Interval:
    """Return the expanded percentile interval of resamples [resamples]; undefined below two clusters."""
    if clusters < 2:
        return NO_INTERVAL
    tail = expanded_tail(clusters, level)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(low), float(high))


def expanded_tail(clusters: int, level: float = LEVEL) -> float:
    """Return the probability to cut off at each end, smaller than (1 - level) / 2 where clusters are few.

    >>> round(expanded_tail(12), 4), round(expanded_tail(100_000), 4)
    (0.0108, 0.025)
    """
    critical = float(special.stdtrit(clusters - 1, (1 + level) / 2))  # Student's t quantile
    return float(special.ndtr(-sqrt(clusters / (clusters - 1)) * critical))  # the normal distribution's


def ratio_resamples(numerators: Floats, denominators: Floats, seed: int) -> Floats:
    """Return the resamples of sum(numerators) / sum(denominators), from one number a cluster each; [resamples].

    `numerators` [columns, clusters] of several columns are resampled together: [columns, resamples]. A resample that
    draws nothing but clusters with denominator 0 has no ratio and is left out.
    """
    drawn = weights(len(denominators), seed)
    top, bottom = (drawn @ numerators.T).T, drawn @ denominators
    defined = bottom > 0
    return np.asarray(top[..., defined] / bottom[defined], np.float64)


class Ordered(NamedTuple):
    """Values in ascending order with the cluster of each; both [rows]."""

    values: Floats
    ids: Ints
    clusters: int


def order(values: ArrayLike, clusters: Clusters) -> Ordered:
    """Sort once for any number of quantiles."""
    array = finite(values)
    by_value = np.argsort(array)  # the order of equal values changes no quantile
    return Ordered(array[by_value], clusters.ids[by_value], clusters.count)


def quantile(ordered: Ordered, level: float) -> float:
    """Return the smallest value with at least `level` of all rows at or below it."""
    return float(ordered.values[int(_rank(np.array([level * len(ordered.values)]))[0]) - 1])


def quantile_resamples(ordered: Ordered, levels: Sequence[float], seed: int) -> Floats:
    """Return quantiles of every resample, each row weighing what its cluster was drawn; [levels, resamples].

    Exact, without a sum over all rows for each resample: the sorted rows are cut in about sqrt(rows) buckets;
    the counts of buckets and clusters tell by one matrix product which bucket a resample's quantile lies in,
    and only that bucket's rows are then added up.
    """
    drawn = weights(ordered.clusters, seed)
    width = max(1, round(sqrt(len(ordered.values))))
    upto = drawn @ _counts(ordered, width).cumsum(axis=1)  # [resamples, buckets], whole numbers
    kind: type[np.integer[Any]] = np.uint16 if ordered.clusters < _UINT16 else np.int64
    small = drawn.astype(kind)  # the same whole numbers, read several times as fast
    columns = [_find(ordered, small, upto, width, _rank(level * upto[:, -1])) for level in levels]
    return np.stack(columns)


def finite(values: ArrayLike) -> Floats:
    """Return the values as float64.

    Raises:
        NonFiniteError: some are NaN or infinite.
    """
    array = np.asarray(values, np.float64)
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise NonFiniteError(bad, array.size)
    return array


def _rank(target: Floats) -> Floats:
    return np.maximum(np.ceil(target - _RANK_SLACK), 1)


def _counts(ordered: Ordered, width: int) -> Floats:
    """Return how many rows of each cluster each bucket holds, [clusters, buckets]."""
    rows = len(ordered.values)
    buckets = -(-rows // width)
    cell = ordered.ids * buckets + np.arange(rows) // width
    counts = np.bincount(cell, minlength=ordered.clusters * buckets)
    return counts.reshape(ordered.clusters, buckets).astype(np.float64)


def _find(ordered: Ordered, drawn: NDArray[np.integer[Any]], upto: Floats, width: int, rank: Floats) -> Floats:
    """Return the value at each resample's rank (counted from 1): first its bucket, then its row in the bucket."""
    resamples = np.arange(len(drawn))
    bucket = (upto < rank[:, None]).sum(axis=1)
    before = np.where(bucket > 0, upto[resamples, bucket - 1], 0.0)
    rows = np.minimum(bucket[:, None] * width + np.arange(width), len(ordered.values) - 1)
    inside = before[:, None] + drawn[resamples[:, None], ordered.ids[rows]].cumsum(axis=1, dtype=np.int64)
    place = (inside < rank[:, None]).sum(axis=1)
    return np.asarray(ordered.values[rows[resamples, place]], np.float64)
