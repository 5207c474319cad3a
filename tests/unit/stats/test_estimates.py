"""The bootstrap against its slow definition, SciPy's own, and closed forms."""

from math import ceil, exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from qeval.stats import bootstrap, estimates
from qeval.stats.bootstrap import Clusters, NonFiniteError

SEED = 7


def ragged(seed=0, clusters=9, rows=400):
    """Heavy-tailed values in clusters of unequal size that share an offset."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(clusters, size=rows, p=np.arange(1, clusters + 1) / sum(range(1, clusters + 1)))
    values = np.exp(rng.normal(size=clusters)[labels] * 0.4 + rng.normal(size=rows))
    return values, Clusters.of(labels)


def slow_resamples(statistic, values, clusters, seed):
    """The definition: write down every drawn cluster's rows as often as it was drawn, then reduce."""
    members = [values[clusters.ids == index] for index in range(clusters.count)]
    drawn = bootstrap.weights(clusters.count, seed).astype(int)
    return np.array(
        [
            statistic(np.concatenate([m for m, times in zip(members, row, strict=True) for _ in range(times)]))
            for row in drawn
        ]
    )


def test_weights_draw_as_many_clusters_as_there_are_and_repeat():
    drawn = bootstrap.weights(12, SEED)
    assert drawn.shape == (bootstrap.RESAMPLES, 12)
    assert (drawn.sum(axis=1) == 12).all()
    assert drawn.mean() == pytest.approx(1.0)
    assert drawn.var() == pytest.approx(11 / 12, rel=0.03)  # of a multinomial cell
    assert (bootstrap.weights(12, SEED + 1) != drawn).any()
    with pytest.raises(ValueError, match="read-only"):
        drawn[0, 0] = 3


def test_mean_and_its_resamples_equal_the_slow_definition():
    values, clusters = ragged()
    slow = slow_resamples(np.mean, values, clusters, SEED)
    fast = bootstrap.ratio_resamples(clusters.sums(values), clusters.sizes(), SEED)
    np.testing.assert_allclose(fast, slow, rtol=1e-12)
    got = estimates.mean(values, clusters, unit="nats", better="lower", seed=SEED)
    tail = bootstrap.expanded_tail(clusters.count)
    assert got.value == pytest.approx(values.mean(), rel=1e-12)
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(slow, [tail, 1 - tail])))
    assert (got.n, got.clusters) == (len(values), clusters.count)


def test_mean_interval_equals_scipys_bootstrap_over_equal_clusters():
    rng = np.random.default_rng(3)
    per_cluster = np.exp(rng.normal(size=(40, 25)))
    clusters = Clusters.of(np.repeat(np.arange(40), 25))
    got = estimates.mean(per_cluster.ravel(), clusters, unit="nats", better="lower", seed=SEED)
    theirs = scipy_stats.bootstrap(
        (per_cluster.mean(axis=1),), np.mean, n_resamples=20_000, method="percentile", rng=rng,
        confidence_level=1 - 2 * bootstrap.expanded_tail(40),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert got.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert got.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_mean_interval_of_many_normal_rows_is_the_t_interval():
    values = np.random.default_rng(1).normal(5, 2, size=2000)
    got = estimates.mean(values, Clusters.single_rows(2000), unit="", better="lower", seed=SEED)
    low, high = scipy_stats.t.interval(0.95, 1999, values.mean(), scipy_stats.sem(values))
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_quantile_resamples_equal_the_slow_definition_exactly():
    values, clusters = ragged(clusters=5, rows=157)
    values = np.round(values, 1)  # with ties
    levels = (0.5, 0.9, 0.99, 0.999)
    ordered = bootstrap.order(values, clusters)
    fast = bootstrap.quantile_resamples(ordered, levels, SEED)
    for level, row in zip(levels, fast, strict=True):
        slow = slow_resamples(
            lambda rows, level=level: np.sort(rows)[max(ceil(level * len(rows) - 1e-9), 1) - 1],
            values, clusters, SEED,
        )  # fmt: skip
        np.testing.assert_array_equal(row, slow)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99]))
def test_point_quantile_is_numpys_inverted_cdf(values, level):
    ordered = bootstrap.order(values, Clusters.single_rows(len(values)))
    assert bootstrap.quantile(ordered, level) == np.quantile(values, level, method="inverted_cdf")


def test_quantiles_carry_intervals_around_them():
    values, clusters = ragged(clusters=20, rows=4000)
    for got in estimates.quantiles(values, (0.5, 0.9), clusters, unit="nats", better="lower", seed=SEED):
        assert got.low < got.value < got.high
        assert (got.n, got.clusters) == (4000, 20)


def test_perplexity_weighs_tokens_not_windows():
    nll = np.array([1.0, 1.0, 1.0, 3.0])
    clusters = Clusters.of([0, 0, 0, 1])
    assert estimates.perplexity(nll, clusters, seed=SEED).value == pytest.approx(exp(1.5))


def test_perplexity_ratio_is_the_ratio_of_perplexities():
    values, clusters = ragged()
    other = values + 0.1 * np.sin(np.arange(len(values)))
    got = estimates.perplexity_ratio(other, values, clusters, seed=SEED)
    assert got.value == pytest.approx(exp(other.mean()) / exp(values.mean()), rel=1e-12)
    assert got.low < got.value < got.high


def test_pairing_makes_the_interval_of_a_difference_narrower():
    values, clusters = ragged(clusters=30, rows=3000)
    other = values + 0.01 + 0.001 * np.sin(np.arange(len(values)))
    paired = estimates.difference(other, values, clusters, unit="nats", better="lower", seed=SEED)
    alone = estimates.mean(values, clusters, unit="nats", better="lower", seed=SEED)
    assert paired.value == pytest.approx((other - values).mean())
    assert paired.high - paired.low < 0.01 * (alone.high - alone.low)


def test_macro_mean_counts_every_cluster_once():
    clusters = Clusters.of(["law"] * 3 + ["anatomy"])
    got = estimates.macro_mean([1, 1, 1, 0], clusters, unit="fraction", better="higher", seed=SEED)
    assert (got.value, got.n, got.clusters) == (0.5, 4, 2)


def test_root_mean_square_is_one():
    got = estimates.root_mean_square([3.0, -4.0], Clusters.of([0, 1]), unit="p", better="lower", seed=SEED)
    assert got.value == pytest.approx(12.5**0.5)


def test_one_cluster_has_a_value_and_no_interval():
    clusters = Clusters.of([4, 4, 4])
    got = estimates.mean([1.0, 2.0, 3.0], clusters, unit="nats", better="lower", seed=SEED)
    assert (got.value, got.low, got.high) == (2.0, None, None)
    (median,) = estimates.quantiles([1.0, 2.0, 3.0], [0.5], clusters, unit="nats", better="lower", seed=SEED)
    assert (median.value, median.low, median.high) == (2.0, None, None)


def test_no_rows_have_no_value():
    none = Clusters.single_rows(0)
    got = estimates.mean([], none, unit="nats", better="lower", seed=SEED)
    assert (got.value, got.low, got.high, got.n) == (None, None, None, 0)
    assert estimates.macro_mean([], none, unit="nats", better="lower", seed=SEED).value is None
    (median,) = estimates.quantiles([], [0.5], none, unit="nats", better="lower", seed=SEED)
    assert median.value is None
    assert estimates.maximum([], none, unit="nats", better="lower").value is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "reduce",
    [
        lambda v, c: estimates.mean(v, c, unit="", better="lower", seed=0),
        lambda v, c: estimates.macro_mean(v, c, unit="", better="lower", seed=0),
        lambda v, c: estimates.perplexity(v, c, seed=0),
        lambda v, c: estimates.perplexity_ratio([0.0, 0.0, 0.0], v, c, seed=0),
        lambda v, c: estimates.root_mean_square(v, c, unit="", better="lower", seed=0),
        lambda v, c: estimates.quantiles(v, [0.5], c, unit="", better="lower", seed=0),
        lambda v, c: estimates.maximum(v, c, unit="", better="lower"),
    ],
)
def test_values_that_are_not_finite_are_counted_and_refused(bad, reduce):
    with pytest.raises(NonFiniteError, match="2 of 3 values are not finite") as caught:
        reduce([bad, 1.0, bad], Clusters.of([0, 1, 2]))
    assert (caught.value.count, caught.value.total) == (2, 3)


def test_select_drops_clusters_that_lose_all_rows():
    clusters = Clusters.of(["a", "b", "c", "b"]).select(np.array([False, True, True, True]))
    assert (clusters.count, clusters.ids.tolist()) == (2, [0, 1, 0])


def test_columns_resampled_together_are_the_columns_resampled_alone():
    generator = np.random.default_rng(3)
    columns = generator.normal(size=(4, 60))
    clusters = Clusters.of(np.arange(60) % 12)
    together = estimates.means(columns, clusters, unit="nats", better="lower", seed=5)
    for column, found in zip(columns, together, strict=True):
        alone = estimates.mean(column, clusters, unit="nats", better="lower", seed=5)
        assert [found.value, found.low, found.high] == pytest.approx([alone.value, alone.low, alone.high], abs=1e-12)
        assert (found.n, found.clusters) == (60, 12)
