"""The calibration error of answers: how far the probabilities that a model gives lie from how often it is right."""

import numpy as np
from numpy.typing import ArrayLike

from qeval.stats.bootstrap import Clusters, finite, interval, weights
from qeval.types import Estimate

BINS = 15
"""Bins of equal width, as in Guo et al., arXiv 1706.04599."""


def expected_calibration_error(
    confidences: ArrayLike, rights: ArrayLike, clusters: Clusters, *, seed: int, bins: int = BINS
) -> Estimate:
    """Return the mean over bins of |share right - mean confidence|, each weighted by its rows.

    An error is never below zero, so the noise of small bins adds to it: compare models on the same questions.

    Args:
        confidences: The probability of the answer that was given, [rows], between 0 and 1.
        rights: 1 where the answer is right, else 0, [rows].
        clusters: The rows' clusters, which the interval resamples.
        seed: Of the bootstrap.
        bins: The number of bins of equal width.
    """
    confidence, right = finite(confidences), finite(rights)
    if not confidence.size:
        return Estimate(None, None, None, "fraction", "lower", 0, clusters.count)

    # the gap of each cluster's rows in each bin: a resample adds up gaps before it takes their size
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.zeros((clusters.count, bins))
    np.add.at(gaps, (clusters.ids, places), right - confidence)
    value = float(np.abs(gaps.sum(0)).sum() / confidence.size)
    if clusters.count < 2:
        return Estimate(value, None, None, "fraction", "lower", confidence.size, clusters.count)
    drawn = weights(clusters.count, seed)
    resampled = np.abs(drawn @ gaps).sum(1) / (drawn @ clusters.sizes())
    ends = interval(resampled, clusters.count)
    return Estimate(value, ends.low, ends.high, "fraction", "lower", confidence.size, clusters.count)
