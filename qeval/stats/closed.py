"""The mean of clustered rows in closed form: standard error, degrees of freedom, t interval.

The standard error is CR2 (R. Bell and D. McCaffrey, Survey Methodology 28, 2002): each cluster's summed residual
is divided by sqrt(1 - its share of the rows), which takes out the bias that the estimated mean puts into the plain
sandwich. The degrees of freedom are theirs too (Satterthwaite, under independent rows): close to clusters - 1
where clusters are of one size, fewer where a few large ones carry most rows. With every row a cluster of its own
both are those of the one-sample t interval.
"""

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats has the same functions, and takes half a second to import

from qeval.stats.bootstrap import LEVEL, NO_INTERVAL, Clusters, Floats, Interval, finite


@dataclass(frozen=True)
class Mean:
    """The mean of `n` rows in `clusters` clusters, in the rows' unit.

    `error` is its clustered standard error and `freedom` the degrees of freedom of that, both None below two
    clusters; `naive_error` takes the rows as independent, and is None below two rows.
    """

    value: float
    error: float | None
    freedom: float | None
    naive_error: float | None
    n: int
    clusters: int

    @property
    def design_effect(self) -> float | None:
        """The number of clustered rows worth one independent row; 1 where the rows do not vary at all."""
        if self.error is None or self.naive_error is None:
            return None
        return (self.error / self.naive_error) ** 2 if self.naive_error else 1.0

    def bounds(self, confidence: float) -> Interval:
        """Return the lower and the upper bound, each held with `confidence` (one-sided)."""
        if self.error is None or self.freedom is None:
            return NO_INTERVAL
        reach = critical(confidence, self.freedom) * self.error
        return Interval(self.value - reach, self.value + reach)

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the two-sided t interval."""
        return self.bounds((1 + level) / 2)

    def grown(self, factor: float) -> "Mean":
        """Return what `factor` times as many rows of the same kind, in as many times more clusters, would give."""
        shrink = sqrt(factor)
        return replace(
            self,
            error=None if self.error is None else self.error / shrink,
            naive_error=None if self.naive_error is None else self.naive_error / shrink,
            freedom=None if self.freedom is None else self.freedom * factor,
            n=round(self.n * factor),
            clusters=round(self.clusters * factor),
        )


def clustered_mean(values: ArrayLike, clusters: Clusters) -> Mean:
    """Return the mean over rows with its clustered error.

    Raises:
        NonFiniteError: some values are NaN or infinite.
        ValueError: there are no values.
    """
    array = finite(values)
    if not array.size:
        raise ValueError("A mean needs at least one row.")
    value = float(array.mean())
    naive = float(array.std(ddof=1)) / sqrt(array.size) if array.size > 1 else None
    if clusters.count < 2:
        return Mean(value, None, None, naive, array.size, clusters.count)
    share = clusters.sizes() / array.size
    return Mean(
        value, _error(clusters.sums(array - value), share, array.size), _freedom(share), naive,
        array.size, clusters.count,
    )  # fmt: skip


def critical(confidence: float, freedom: float) -> float:
    """Return Student's t quantile for a one-sided bound."""
    return float(special.stdtrit(freedom, confidence))


def _error(residuals: Floats, share: Floats, rows: int) -> float:
    """Return the CR2 error from a cluster's sum of `residuals` [clusters] and its `share` of the rows [clusters]."""
    return float(np.sqrt((residuals**2 / (1 - share)).sum())) / rows


def _freedom(share: Floats) -> float:
    """Return tr(P)^2 / tr(P^2), P[g, h] = w[g] w[h] (share[g] [g = h] - share[g] share[h]), w = 1 / sqrt(1 - share)."""
    weight = 1 / (1 - share)  # squared; tr(P) is then the sum of the shares, 1
    squares = float(((weight * share) ** 2 * (1 - 2 * share)).sum()) + float((weight * share**2).sum()) ** 2
    return 1 / squares
