"""How often the interval holds the truth, where it is known: few windows of heavy-tailed tokens."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qeval.stats import bootstrap

TRUTH = np.exp(0.3**2 / 2 + 1.2**2 / 2)  # the mean of the lognormal drawn below
REPEATS = 300


def covered(clusters):
    """The shares of intervals that hold the truth: expanded percentile, and plain percentile."""
    rng = np.random.default_rng(5)
    hits = np.zeros(2)
    for _ in range(REPEATS):
        logs = rng.normal(0, 0.3, size=(clusters, 1)) + rng.normal(0, 1.2, size=(clusters, 100))
        resampled = bootstrap.ratio_resamples(np.exp(logs).sum(axis=1), np.full(clusters, 100.0), 11)
        wide = bootstrap.interval(resampled, clusters)
        plain = np.quantile(resampled, [0.025, 0.975])
        hits += [wide.low <= TRUTH <= wide.high, plain[0] <= TRUTH <= plain[1]]
    return hits / REPEATS


@pytest.mark.parametrize(("clusters", "least"), [(8, 0.90), (16, 0.91), (64, 0.92)])
def test_interval_covers_about_what_it_says(clusters, least):
    expanded, plain = covered(clusters)
    assert expanded >= least
    assert expanded >= plain


def test_tokens_taken_as_independent_would_cover_far_too_little():
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(REPEATS):
        values = np.exp(rng.normal(0, 0.3, size=(16, 1)) + rng.normal(0, 0.3, size=(16, 200)))
        low, high = scipy_stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(values.size))
        hits += low <= np.exp(0.3**2) <= high
    assert hits / REPEATS < 0.5
