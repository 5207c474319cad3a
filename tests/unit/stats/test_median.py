"""The median's interval against the binomial's definition and SciPy's own, and how often both intervals hold."""

from math import comb

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qeval.stats import bootstrap
from qeval.stats.bootstrap import NonFiniteError
from qeval.stats.median import FEWEST, half_width, median, median_ratio, order_interval

REPEATS = 400


def drifting(rng, count):
    """Latencies as a machine gives them: skewed, with an outlier now and then; the median is 1."""
    return np.exp(rng.normal(0, 0.05, count)) * np.where(rng.random(count) < 0.02, 1.5, 1.0)


@pytest.mark.parametrize("count", [*range(1, 40), 200])
def test_the_ends_are_the_innermost_order_statistics_that_keep_the_level(count):
    ends = order_interval(np.arange(count)[::-1])
    keeps = [k for k in range(1, count // 2 + 1) if 2 * sum(comb(count, i) for i in range(k)) <= 0.05 * 2**count]
    assert (count >= FEWEST) == bool(keeps)
    assert ends == ((keeps[-1] - 1, count - keeps[-1]) if keeps else (None, None))


def test_the_interval_is_scipys_of_the_median():
    values = np.random.default_rng(1).lognormal(size=31)
    theirs = scipy_stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert order_interval(values) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("count", [6, 9, 15, 40])
def test_the_interval_covers_at_least_what_it_says(count):
    rng = np.random.default_rng(count)
    ends = [order_interval(rng.lognormal(0.0, 0.7, count)) for _ in range(REPEATS)]
    assert np.mean([end.low <= 1.0 <= end.high for end in ends]) >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / REPEATS)


@pytest.mark.parametrize("count", [6, 9, 15, 40])
def test_the_interval_of_a_ratio_covers_about_what_it_says(count):
    rng = np.random.default_rng(count + 100)
    truth, hits = 2.0 * np.median(drifting(rng, 400_000)) / np.median(drifting(rng, 400_000)), 0
    for _ in range(REPEATS):
        found = median_ratio(2.0 * drifting(rng, count), drifting(rng, count), better="lower", seed=3)
        hits += found.low <= truth <= found.high
    assert hits / REPEATS >= 0.93


def test_resampled_medians_equal_the_slow_definition():
    top, bottom = np.random.default_rng(2).lognormal(size=(2, 9))
    slow = [
        np.array([np.median(np.repeat(np.sort(side), drawn.astype(int))) for drawn in bootstrap.weights(9, seed)])
        for side, seed in ((top, 5), (bottom, 6))
    ]
    tail = bootstrap.expanded_tail(9)
    found = median_ratio(top, bottom, better="lower", seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow[0] / slow[1], [tail, 1 - tail])))
    assert found.value == pytest.approx(np.median(top) / np.median(bottom))


def test_few_or_no_repeats_have_a_value_at_most():
    assert median([], unit="s", better="lower").value is None
    five = median([5.0, 1.0, 2.0, 4.0, 3.0], unit="s", better="lower")
    assert (five.value, five.low, five.high) == (3.0, None, None)
    assert half_width(five) is None
    ratio = median_ratio([2.0] * 9, [1.0] * 5, better="higher", seed=0)
    assert (ratio.value, ratio.low, ratio.n) == (2.0, None, 5)
    assert median_ratio([2.0], [0.0], better="higher", seed=0).value is None


def test_half_width_is_a_share_of_the_median():
    assert half_width(median([9.0, 10.0, 10.0, 10.0, 10.0, 12.0], unit="s", better="lower")) == pytest.approx(0.15)


def test_values_that_are_not_finite_are_an_error():
    with pytest.raises(NonFiniteError):
        median([1.0, np.nan], unit="s", better="lower")
