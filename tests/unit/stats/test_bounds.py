"""Closed-form errors and bounds against their slow definitions, SciPy's and statsmodels' own, and the bootstrap."""

from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from qeval.stats import bounds, estimates
from qeval.stats.bootstrap import Clusters, NonFiniteError
from qeval.stats.closed import Mean, clustered_mean


def ragged(seed=0, clusters=12, rows=500):
    rng = np.random.default_rng(seed)
    labels = rng.choice(clusters, size=rows, p=np.arange(1, clusters + 1) / sum(range(1, clusters + 1)))
    return np.exp(0.3 * rng.normal(size=clusters)[labels] + 0.5 * rng.normal(size=rows)), Clusters.of(labels)


def bell_mccaffrey(values, ids):
    """CR2 and its degrees of freedom, with every matrix written out."""
    n, x = len(values), np.ones((len(values), 1))
    hat = x @ np.linalg.inv(x.T @ x) @ x.T
    residuals, bread = values - hat @ values, np.linalg.inv(x.T @ x)
    columns, meat = [], 0.0
    for g in np.unique(ids):
        rows = ids == g
        w, v = np.linalg.eigh(np.eye(rows.sum()) - hat[np.ix_(rows, rows)])
        adjust = v @ np.diag(w**-0.5) @ v.T
        meat += (x[rows].T @ adjust @ residuals[rows]).item() ** 2
        columns.append((np.eye(n) - hat)[:, rows] @ adjust @ x[rows] @ bread)
    gram = np.hstack(columns).T @ np.hstack(columns)
    return float(bread[0, 0] * np.sqrt(meat)), np.trace(gram) ** 2 / np.trace(gram @ gram)


def test_error_and_freedom_equal_their_matrix_definition():
    values, clusters = ragged()
    got = clustered_mean(values, clusters)
    assert (got.error, got.freedom) == pytest.approx(bell_mccaffrey(values, clusters.ids), rel=1e-9)
    assert got.freedom < clusters.count - 1


def test_equal_clusters_give_statsmodels_clustered_error_and_clusters_minus_one():
    linear_model = pytest.importorskip("statsmodels.regression.linear_model")
    values, clusters = np.random.default_rng(1).gamma(1, size=600), Clusters.of(np.repeat(np.arange(20), 30))
    theirs = linear_model.OLS(values, np.ones(600)).fit(cov_type="cluster", cov_kwds={"groups": clusters.ids})
    got = clustered_mean(values, clusters)
    assert got.error == pytest.approx(float(theirs.bse[0]), rel=1e-10)
    assert got.freedom == pytest.approx(19)


def test_single_rows_give_scipys_t_interval():
    values = np.random.default_rng(2).normal(5, 2, 40)
    got = clustered_mean(values, Clusters.single_rows(40))
    theirs = scipy_stats.t.interval(0.95, 39, values.mean(), scipy_stats.sem(values))
    assert got.interval() == pytest.approx(theirs)
    assert got.design_effect == pytest.approx(1)


def test_closed_form_and_bootstrap_agree_on_many_clusters():
    rng = np.random.default_rng(3)
    values = np.repeat(rng.normal(0, 0.3, 200), 30) + rng.normal(0, 1, 6000)
    clusters = Clusters.of(np.repeat(np.arange(200), 30))
    closed = clustered_mean(values, clusters).interval()
    drawn = estimates.mean(values, clusters, unit="nats", better="lower", seed=5)
    width = closed.high - closed.low
    assert (drawn.low, drawn.high) == pytest.approx(closed, abs=0.04 * width)


def test_fewer_than_two_clusters_bound_nothing():
    got = clustered_mean([1.0, 2.0], Clusters.of(["a", "a"]))
    assert (got.error, got.bounds(0.95).low, got.design_effect) == (None, None, None)
    for of in (
        bounds.share_of([0, 1], Clusters.of([0, 0])),
        bounds.quantile_of([0, 1], 0.5, Clusters.of([0, 0])),
        bounds.drop_of([0, 1], [1, 1], Clusters.of([0, 0])),
        bounds.increase_of([0.1, 0.2], Clusters.of([0, 0])),
    ):
        assert of.bounds(0.95) == (None, None)
        assert bounds.smallest_effect(of, 0.95) is None
        assert bounds.factor_to_decide(of, 10, 0.95) is None


def test_no_rows_and_non_finite_rows_are_errors():
    with pytest.raises(ValueError, match="at least one row"):
        clustered_mean([], Clusters.single_rows(0))
    with pytest.raises(NonFiniteError, match="1 of 2"):
        clustered_mean([1.0, float("nan")], Clusters.single_rows(2))


def test_exact_share_equals_scipys_clopper_pearson():
    for count, rows in ((0, 30), (1, 30), (7, 50), (50, 50)):
        theirs = scipy_stats.binomtest(count, rows).proportion_ci(0.90, method="exact")
        assert bounds.exact_share(count, rows, 0.95) == pytest.approx((theirs.low, theirs.high))


def test_no_flip_at_all_is_bounded_by_what_the_answers_can_exclude():
    nothing = bounds.share_of(np.zeros(280), Clusters.single_rows(280)).bounds(0.95)
    assert nothing == pytest.approx((0, 1 - 0.05 ** (1 / 280)))
    clustered = bounds.share_of(np.zeros(280), Clusters.of(np.repeat(np.arange(14), 20))).bounds(0.95)
    assert clustered.high > nothing.high  # fewer clusters are known less well


def test_a_drop_without_a_changed_answer_has_tangos_closed_form():
    z = scipy_stats.norm.ppf(0.95)
    got = bounds.drop_of(np.ones(280), np.ones(280), Clusters.single_rows(280)).bounds(0.95)
    assert got == pytest.approx((-(z**2) / (280 + z**2), z**2 / (280 + z**2)))


def test_tangos_bounds_solve_the_score_equation_written_out():
    low, high = bounds.paired_drop(0.43, 0.53, 100, 0.975)
    for drop in (low, high):  # the score equation itself, with the null's likelihood maximized by brute force
        cells = np.linspace(1e-6, 1, 400_001)
        gained, lost = cells, cells + drop
        fits = (lost > 0) & (lost + gained < 1)
        likelihood = 43 * np.log(lost[fits]) + 53 * np.log(gained[fits]) + 4 * np.log(1 - lost[fits] - gained[fits])
        best = gained[fits][np.argmax(likelihood)]
        variance = (2 * best + drop - drop**2) / 100
        assert abs(-0.10 - drop) / np.sqrt(variance) == pytest.approx(1.959964, abs=1e-3)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(40, 500))
def test_a_drops_bounds_hold_its_value_and_narrow_with_rows(lost, gained, rows):
    few = bounds.paired_drop(lost / rows, gained / rows, rows, 0.95)
    many = bounds.paired_drop(lost / rows, gained / rows, 10 * rows, 0.95)
    assert few.low < many.low < (lost - gained) / rows < many.high < few.high


def test_quantile_bounds_are_order_statistics_of_the_binomial():
    values = np.random.default_rng(4).gamma(1, size=3000)
    of = bounds.quantile_of(values, 0.99, Clusters.single_rows(3000))
    got, ascending = of.bounds(0.95), np.sort(values)
    assert of.value == ascending[2969]
    # the definition: the most rows above such that so few, were the share above 1 %, would come 5 % of the time
    few = max(k for k in range(30) if scipy_stats.binom.cdf(k, 3000, 0.01) <= 0.05)
    many = min(k for k in range(30, 100) if scipy_stats.binom.sf(k - 1, 3000, 0.01) <= 0.05)
    assert got == (ascending[3000 - many], ascending[3000 - 1 - few])


def test_a_quantile_farther_out_than_the_rows_reach_has_no_upper_bound():
    got = bounds.quantile_of(np.arange(1000.0), 0.999, Clusters.single_rows(1000)).bounds(0.95)
    assert got.high is None
    assert got.low is not None


def test_an_increase_is_the_exponential_of_the_mean_difference():
    values, clusters = ragged()
    closed, got = clustered_mean(values, clusters), bounds.increase_of(values, clusters)
    assert got.value == pytest.approx(exp(values.mean()) - 1)
    assert [log(1 + end) for end in got.bounds(0.95)] == pytest.approx(closed.bounds(0.95))


def test_clustered_flips_count_as_fewer_rows():
    flips = np.repeat([1.0, 0.0], [20, 260])  # all in one subject of fourteen
    clustered = bounds.share_of(flips, Clusters.of(np.repeat(np.arange(14), 20)))
    alone = bounds.share_of(flips, Clusters.single_rows(280))
    assert bounds.effective_rows(clustered.mean, 0.95) < 30
    assert bounds.effective_rows(alone.mean, 0.95) == pytest.approx(280)
    assert clustered.bounds(0.95).high > 2 * alone.bounds(0.95).high


def test_as_many_rows_as_it_says_decide_it():
    mean = bounds.BoundedMean(Mean(0.8, 0.5, 10_000, 0.5, 400, 400))
    factor = bounds.factor_to_decide(mean, 1.0, 0.95)
    assert factor == pytest.approx((1.645 * 0.5 / 0.2) ** 2, rel=0.01)
    assert mean.grown(1.01 * factor).bounds(0.95).high < 1.0 < mean.grown(0.95 * factor).bounds(0.95).high
    assert bounds.factor_to_decide(bounds.BoundedMean(Mean(1.0, 0.5, 10, 0.5, 400, 400)), 1.0, 0.95) is None


def test_the_smallest_effect_is_found_with_its_power():
    mean = bounds.BoundedMean(Mean(0.0, 0.5, 1e6, 0.5, 400, 400))
    effect = bounds.smallest_effect(mean, 0.95)
    draws = np.random.default_rng(6).normal(-effect, 0.5, 200_000)  # so far below a margin of 0
    assert (draws + 1.644854 * 0.5 <= 0).mean() == pytest.approx(0.8, abs=0.005)
