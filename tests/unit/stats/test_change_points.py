"""Change points: the cut found is the best one by the slow definition, and false alarms keep to their rate."""

from itertools import permutations

import numpy as np
import pytest

from qeval.stats.change_points import FEWEST_RUNS, change_point


def largest(series):
    """The largest standardized difference of means over all cuts, written out."""
    n = len(series)
    return max(abs(np.mean(series[:k]) - np.mean(series[k:])) * np.sqrt(k * (n - k) / n) for k in range(1, n))


def test_the_p_value_is_the_share_of_all_orders():
    series = [1.0, 1.2, 0.9, 1.1, 2.0, 2.3]
    orders = [largest(order) for order in permutations(series)]
    share = np.mean([value >= largest(series) - 1e-12 for value in orders])
    got = change_point(series)
    assert got.p_value == pytest.approx(share, abs=0.01)
    assert (got.place, got.before, got.after) == (4, pytest.approx(1.05), pytest.approx(2.15))


def test_false_alarms_keep_to_the_rate_and_changes_are_found():
    rng = np.random.default_rng(0)
    quiet = [change_point(rng.standard_t(3, 12)).p_value <= 0.05 for _ in range(150)]
    assert np.mean(quiet) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 150)
    found = [change_point(np.r_[rng.normal(size=8), rng.normal(4, 1, 8)]) for _ in range(20)]
    assert np.mean([each.p_value <= 0.05 and abs(each.place - 8) <= 1 for each in found]) > 0.9


def test_a_series_that_never_moves_has_no_change_and_a_short_one_no_answer():
    assert change_point([3.0] * 8).p_value == 1
    assert change_point([1.0] * (FEWEST_RUNS - 1)) is None
