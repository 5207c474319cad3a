"""Variance components of repeated scores, against an analysis of variance written out and against simulation."""

import numpy as np
import pytest

from qeval.stats.bootstrap import Clusters
from qeval.stats.closed import clustered_mean
from qeval.stats.repeats import Components, components, difference_of, item_means, repeats_to_decide


def long(table):
    """Scores [items, repeats] as rows."""
    items, repeats = np.indices(table.shape)
    return table.ravel(), items.ravel(), repeats.ravel()


def test_components_are_those_of_the_two_way_analysis_of_variance():
    table = np.random.default_rng(0).normal(size=(7, 4)) + np.array([0, 3, -2, 1])
    n, r = table.shape
    grand, rows, columns = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    residual = ((table - rows - columns + grand) ** 2).sum() / ((n - 1) * (r - 1))
    between = n * ((columns - grand) ** 2).sum() / (r - 1)
    got = components(*long(table))
    assert got.within == pytest.approx(residual)
    assert got.seeds == pytest.approx((between - residual) / n)
    assert (got.repeats, got.repeat_count) == (4, 4)


def test_components_find_the_truth():
    """Draws of spread 2 and repeats of spread 0.5, on average over many tables."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        table = rng.normal(0, 3, (50, 1)) + rng.normal(0, 0.5, (1, 4)) + rng.normal(0, 2, (50, 4))
        got = components(*long(table))
        found.append((got.within, got.seeds))
    within, seeds = np.mean(found, axis=0)
    assert within == pytest.approx(4, rel=0.03)
    assert seeds == pytest.approx(0.25, rel=0.25)


def test_without_repeats_nothing_is_known_of_the_draws():
    got = components(np.arange(5.0), np.arange(5), np.zeros(5, np.int64))
    assert got == Components(None, 0.0, 1.0, 1)
    bounded = difference_of(np.arange(5.0), (got, got), Clusters.single_rows(5))
    assert bounded.mean == clustered_mean(np.arange(5.0), Clusters.single_rows(5))
    assert repeats_to_decide(bounded, 3.0, 0.95) is None


def test_unequal_repeats_count_by_their_harmonic_mean():
    scores, items = np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 1, 1])
    got = components(scores, items, np.array([0, 1, 0, 1, 2]))
    assert got.repeats == pytest.approx(2 / (1 / 2 + 1 / 3))
    assert got.within == pytest.approx((0.5 + 2 / 3) / 3)
    assert item_means(scores, items).tolist() == pytest.approx([0.5, 2 / 3])


def test_a_repeats_own_effect_widens_the_bound():
    rng = np.random.default_rng(2)
    table = rng.normal(0, 0.1, (200, 3)) + np.array([0.0, 1.0, -1.0])
    side = components(*long(table))
    nothing = Components(None, 0.0, 1.0, 1)
    bounded = difference_of(table.mean(1), (nothing, side), Clusters.single_rows(200))
    assert bounded.mean.error == pytest.approx(np.std([0, 1, -1], ddof=1) / np.sqrt(3), rel=0.05)
    assert bounded.mean.freedom == pytest.approx(2, abs=0.1)


def test_the_number_of_repeats_that_would_decide_decides():
    """As many repeats of the same kind do put the bound past the margin, and half as many don't."""
    rng = np.random.default_rng(3)
    chance = rng.random(300)

    def bounded(repeats):
        before, now = (rng.random((300, repeats)) < (chance - loss)[:, None] for loss in (0.0, 0.01))
        sides = tuple(components(*long(each.astype(float))) for each in (before, now))
        return difference_of(before.mean(1) - now.mean(1), sides, Clusters.single_rows(300))

    few = bounded(8)
    margin = few.value + 0.012
    wanted = repeats_to_decide(few, margin, 0.95)
    assert wanted is not None
    many, half = few.repeated(wanted / 8), few.repeated(wanted / 16)
    assert many.bounds(0.95).high <= margin + 1e-9
    assert half.bounds(0.95).high > margin
    # what is foretold of the error is what so many draws have
    assert bounded(wanted).mean.error == pytest.approx(many.mean.error, rel=0.35)
