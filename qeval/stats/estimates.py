"""From rows to Estimates: means, ratios, quantiles and paired differences, with intervals clustered as told.

Every function takes plain values [rows] and the `Clusters` they are resampled by, and raises `NonFiniteError`
when a value is NaN or infinite. No rows at all give an Estimate whose value is None. All sums are in float64.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from qeval.stats.bootstrap import (
    NO_INTERVAL,
    Clusters,
    Floats,
    finite,
    interval,
    order,
    quantile,
    quantile_resamples,
    ratio_resamples,
)
from qeval.types import Better, Estimate

Transform = Callable[[Floats], Floats]


def mean(values: ArrayLike, clusters: Clusters, *, unit: str, better: Better, seed: int) -> Estimate:
    """Return the mean over rows, so that a cluster counts as much as it has rows."""
    array = finite(values)
    return ratio(
        clusters.sums(array),
        clusters.sizes(),
        n=array.size,
        unit=unit,
        better=better,
        seed=seed,
        transform=None,
    )


def means(columns: Sequence[ArrayLike], clusters: Clusters, *, unit: str, better: Better, seed: int) -> list[Estimate]:
    """Return `mean` of several columns over the same rows, in one product with the resamples, which is far faster."""
    arrays = [finite(column) for column in columns]
    sizes = clusters.sizes()
    if not arrays or clusters.count < 2:
        return [mean(array, clusters, unit=unit, better=better, seed=seed) for array in arrays]
    sums = np.stack([clusters.sums(array) for array in arrays])
    resampled = ratio_resamples(sums, sizes, seed)
    estimates = []
    for array, total, drawn in zip(arrays, sums, resampled, strict=True):
        ends = interval(drawn, clusters.count)
        value = float(total.sum()) / float(sizes.sum())
        estimates.append(Estimate(value, ends.low, ends.high, unit, better, array.size, clusters.count))
    return estimates


def perplexity(nll: ArrayLike, clusters: Clusters, *, seed: int) -> Estimate:
    """Return exp of the mean negative log-likelihood (nats) over all tokens, not a mean over windows."""
    array = finite(nll)
    return ratio(
        clusters.sums(array),
        clusters.sizes(),
        n=array.size,
        unit="ppl",
        better="lower",
        seed=seed,
        transform=np.exp,
    )


def perplexity_ratio(nll: ArrayLike, baseline_nll: ArrayLike, clusters: Clusters, *, seed: int) -> Estimate:
    """Return perplexity over the baseline's, on the same tokens: exp of the mean difference of their NLLs."""
    array = finite(nll) - finite(baseline_nll)
    return ratio(
        clusters.sums(array),
        clusters.sizes(),
        n=array.size,
        unit="ratio",
        better="lower",
        seed=seed,
        transform=np.exp,
    )


def root_mean_square(values: ArrayLike, clusters: Clusters, *, unit: str, better: Better, seed: int) -> Estimate:
    """Return the root of the mean square over rows."""
    array = finite(values)
    squares = clusters.sums(array**2)
    return ratio(squares, clusters.sizes(), n=array.size, unit=unit, better=better, seed=seed, transform=np.sqrt)


def difference(
    values: ArrayLike, others: ArrayLike, clusters: Clusters, *, unit: str, better: Better, seed: int
) -> Estimate:
    """Return the mean of the paired differences values - others, row by row."""
    return mean(finite(values) - finite(others), clusters, unit=unit, better=better, seed=seed)


def macro_mean(values: ArrayLike, clusters: Clusters, *, unit: str, better: Better, seed: int) -> Estimate:
    """Return the mean of the clusters' own means: a subject counts as one, whatever its number of questions."""
    array = finite(values)
    sizes = clusters.sizes()
    means = clusters.sums(array) / sizes if array.size else sizes
    return ratio(means, np.ones_like(means), n=array.size, unit=unit, better=better, seed=seed, transform=None)


def mean_of_means(
    parts: Sequence[tuple[ArrayLike, Clusters]],
    *,
    unit: str,
    better: Better,
    seed: int,
    transform: Transform | None = None,
) -> Estimate:
    """Return transform(the mean of the parts' own means): a text counts as one, whatever its length.

    `parts` are rows and their clusters; each part's clusters are resampled by themselves, with draws of their own.
    """
    arrays = [finite(values) for values, _ in parts]
    sums = [clusters.sums(array) for array, (_, clusters) in zip(arrays, parts, strict=True)]
    sizes = [clusters.sizes() for _, clusters in parts]
    n, clusters = sum(array.size for array in arrays), sum(clusters.count for _, clusters in parts)
    if not all(array.size for array in arrays):
        return Estimate(None, None, None, unit, better, n, clusters)
    change = transform or np.asarray
    value = float(change(np.asarray([np.mean([s.sum() / c.sum() for s, c in zip(sums, sizes, strict=True)])]))[0])
    fewest = min(each.count for _, each in parts)
    if fewest < 2:
        return Estimate(value, None, None, unit, better, n, clusters)
    drawn = [ratio_resamples(s, c, seed * len(parts) + i) for i, (s, c) in enumerate(zip(sums, sizes, strict=True))]
    ends = interval(change(np.mean(drawn, axis=0)), fewest)
    return Estimate(value, ends.low, ends.high, unit, better, n, clusters)


def ratio(
    numerators: Floats,
    denominators: Floats,
    *,
    n: int,
    unit: str,
    better: Better,
    seed: int,
    transform: Transform | None = None,
) -> Estimate:
    """Return transform(sum of numerators / sum of denominators), one number a cluster each; `n` counts rows.

    `transform` must be monotonous and work elementwise.
    """
    clusters = len(numerators)
    total = float(denominators.sum())
    if not clusters or total <= 0:
        return Estimate(None, None, None, unit, better, n, clusters)
    change = transform or np.asarray
    value = float(change(np.asarray([float(numerators.sum()) / total]))[0])
    if clusters < 2:
        return Estimate(value, None, None, unit, better, n, clusters)
    ends = interval(change(ratio_resamples(numerators, denominators, seed)), clusters)
    return Estimate(value, ends.low, ends.high, unit, better, n, clusters)


def quantiles(
    values: ArrayLike, levels: Sequence[float], clusters: Clusters, *, unit: str, better: Better, seed: int
) -> list[Estimate]:
    """Return the quantiles at `levels`: the smallest value with at least that share of rows at or below it."""
    ordered = order(values, clusters)
    n, count = len(ordered.values), clusters.count
    if not n:
        return [Estimate(None, None, None, unit, better, 0, 0) for _ in levels]
    points = [quantile(ordered, level) for level in levels]
    if count < 2:
        return [Estimate(point, None, None, unit, better, n, count) for point in points]
    resampled = quantile_resamples(ordered, levels, seed)
    ends = [interval(row, count) for row in resampled]
    return [Estimate(point, end.low, end.high, unit, better, n, count) for point, end in zip(points, ends, strict=True)]


def quantile_over_mean(values: ArrayLike, level: float, clusters: Clusters, *, better: Better, seed: int) -> Estimate:
    """Return a quantile over the mean of the same rows, resampled together; the mean must be above zero."""
    ordered, sums, sizes = order(values, clusters), clusters.sums(finite(values)), clusters.sizes()
    value = quantile(ordered, level) * float(sizes.sum()) / float(sums.sum())
    ends = NO_INTERVAL
    if clusters.count >= 2:
        drawn = quantile_resamples(ordered, [level], seed)[0] / ratio_resamples(sums, sizes, seed)
        ends = interval(drawn, clusters.count)
    return Estimate(value, ends.low, ends.high, "ratio", better, len(ordered.values), clusters.count)


def maximum(values: ArrayLike, clusters: Clusters, *, unit: str, better: Better) -> Estimate:
    """Return the largest value. It has no interval: no resample holds a larger one than was seen."""
    array = finite(values)
    value = float(array.max()) if array.size else None
    return Estimate(value, *NO_INTERVAL, unit, better, array.size, clusters.count)
