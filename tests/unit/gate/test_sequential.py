"""Anytime-valid tests against their definitions, and their false alarms under continuous looking."""

from itertools import product
from math import exp, log, sqrt

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks import sequential as simulation
from qeval.stats.bootstrap import NonFiniteError
from qeval.stats.sequential import BURN_IN, Decision, decide_bounded, decide_sums, log_capital, mixture_radius


def slow_capital(values, margin):
    """The definition, one bet after the other: an imagined value of variance m (1 - m) at the margin comes first."""
    capital, path = 1.0, []
    for t, value in enumerate(values):
        seen = np.array(values[:t])
        gain = (seen - margin).sum() / (t + 1)
        spread = (((seen - margin) ** 2).sum() + margin * (1 - margin)) / (t + 1)
        capital *= 1 + min(max(gain / spread, 0), 0.75 / margin) * (value - margin)
        path.append(capital)
    return path


def test_capital_equals_its_slow_definition():
    values = np.random.default_rng(0).beta(1, 3, 60)
    for margin in (0.1, 0.25, 0.6):
        assert np.exp(log_capital(values, margin)) == pytest.approx(slow_capital(values, margin))


@pytest.mark.parametrize("margin", [0.2, 0.5, 0.9])
def test_the_capital_is_fair_where_the_mean_is_the_margin(margin):
    """Exactly: over all sequences of coin flips, each with its chance, the expected capital is 1."""
    expected = 0.0
    for flips in product((0.0, 1.0), repeat=9):
        heads = sum(flips)
        expected += margin**heads * (1 - margin) ** (9 - heads) * exp(log_capital(np.array(flips), margin)[-1])
    assert expected == pytest.approx(1, abs=1e-12)


def test_the_radius_equals_its_formula_and_lies_above_the_exact_mixture():
    """The exact bound solves 2 / sqrt(v) exp(r^2 s^2 / 2 v) Phi(r s / sqrt(v)) = 1 / alpha, with v = t r^2 + 1."""
    alpha, level = 0.05, -2 * log(0.1)
    rho2 = (level + log(level + 1)) / 40
    for t in (5, 40, 300):
        got, v = mixture_radius(np.array([t]), alpha, 40)[0], t * rho2 + 1
        assert got == pytest.approx(sqrt(2 * v / (t * t * rho2) * log(1 + sqrt(v) / (2 * alpha))))
        total = got * t
        capital = 2 / sqrt(v) * exp(rho2 * total**2 / (2 * v)) * scipy_stats.norm.cdf(sqrt(rho2 / v) * total)
        assert 1 / alpha <= capital < 1.3 / alpha


def test_the_radius_is_tightest_relative_to_a_fixed_test_where_it_is_asked_to_be():
    counts = np.arange(1, 2000)
    relative = mixture_radius(counts, 0.05, 100) * np.sqrt(counts)
    assert counts[np.argmin(relative)] == pytest.approx(100, rel=0.25)


def test_clear_cases_are_decided_and_which_side_is_said():
    assert decide_bounded(np.zeros(2000), 0.04, 0.05) == Decision("below", 99)
    assert decide_bounded(np.ones(2000), 0.04, 0.05).side == "above"
    assert decide_bounded(np.zeros(20), 0.04, 0.05) is None
    assert decide_bounded([], 0.04, 0.05) is None
    assert decide_bounded(np.full(3000, 0.0), 0.01, 0.05, low=-1).side == "below"
    assert decide_sums(np.full(40, -3.0), 0.05, 300) == Decision("below", BURN_IN)
    assert decide_sums(np.full(40, 3.0), 0.05, 300) == Decision("above", BURN_IN)
    assert decide_sums(np.full(BURN_IN - 1, 3.0), 0.05, 300) is None


def test_windows_in_which_nothing_happened_prove_no_more_than_the_least_variance_lets_them():
    nothing = np.full(60, -0.1)
    assert decide_sums(nothing, 0.05, 300) is not None
    assert decide_sums(nothing, 0.05, 300, least_variance=1.0) is None


def test_values_that_no_bet_may_take_are_refused():
    with pytest.raises(NonFiniteError):
        decide_bounded([0.1, float("nan")], 0.5, 0.05)
    with pytest.raises(NonFiniteError):
        decide_sums([0.1, float("inf")], 0.05, 300)
    for values, margin in (([0.1, 1.2], 0.5), ([0.1], 0.0), ([0.1], 1.0)):
        with pytest.raises(ValueError, match="must lie in"):
            decide_bounded(values, margin, 0.05)


@pytest.mark.parametrize(
    "name", ["flips at most 4 %", "drop at most 1 pt, 2 % change", "mean KL at most 0.05", "p99.9 KL"]
)
def test_false_alarms_stay_under_the_level_and_clear_cases_end_early(name):
    rule = simulation.rules()[name]
    below, above, used = simulation.played(rule, rule.margin, 200)
    slack = 2.5 * sqrt(0.05 * 0.95 / 200)
    assert max(below, above) <= 0.05 + slack
    assert used > 0.9
    for truth, side in zip(rule.clear, (0, 1), strict=True):
        *claimed, used = simulation.played(rule, truth, 60)
        assert claimed[side] >= 0.98
        assert used <= simulation.MOST
