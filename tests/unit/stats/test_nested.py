"""Variance components against what they were drawn with, and against a plain analysis of variance."""

import numpy as np
import pytest

from qeval.stats.nested import draws_to_decide, nested_variances


def drawn(rng, groups, draws, windows, sds):
    """Figures of known components: groups, draws, the residual of a window; windows differ by 1."""
    of_group, of_draw, residual = sds
    shape = (groups, draws, windows)
    return (
        rng.normal(0, 1, (1, 1, windows))
        + rng.normal(0, of_group, (groups, 1, 1))
        + rng.normal(0, of_draw, (groups, draws, 1))
        + rng.normal(0, residual, shape)
    )


def test_components_are_those_that_figures_were_drawn_with():
    rng, sds = np.random.default_rng(5), (0.3, 0.2, 0.4)
    found = [nested_variances(drawn(rng, 4, 4, 8, sds)) for _ in range(800)]
    assert np.mean([each.groups for each in found]) == pytest.approx(0.09, rel=0.15)
    assert np.mean([each.draws for each in found]) == pytest.approx(0.04, rel=0.1)
    assert np.mean([each.residual for each in found]) == pytest.approx(0.16 / 8, rel=0.05)


def test_components_are_the_mean_squares_of_their_definition():
    values = drawn(np.random.default_rng(0), 3, 2, 5, (1.0, 1.0, 0.1))
    cells = values.mean(2)
    windows = values.mean((0, 1))
    rest = [
        values[t, s, w] - cells[t, s] - windows[w] + values.mean() for t in range(3) for s in range(2) for w in range(5)
    ]
    residual = sum(each**2 for each in rest) / (5 * 4) / 5
    within = np.mean([np.var(cells[t], ddof=1) for t in range(3)])
    between = np.var(cells.mean(1), ddof=1)
    found = nested_variances(values)
    assert found.residual == pytest.approx(residual)
    assert found.draws == pytest.approx(max(within - residual, 0))
    assert found.groups == pytest.approx(max(between - within / 2, 0))


def test_what_one_of_a_kind_can_not_show_is_none():
    rng = np.random.default_rng(1)
    assert nested_variances(rng.normal(size=(1, 3, 4))).groups is None
    assert nested_variances(rng.normal(size=(3, 1, 4))).draws is None
    assert nested_variances(rng.normal(size=(2, 3, 1))).residual is None


def test_the_draws_that_decide_do_so():
    """Of a mean of 1 and a deviation of 2: 18 draws, by the t interval of one sample."""
    differences = np.array([[1 - np.sqrt(2), 1 + np.sqrt(2)]])  # a standard deviation of 2
    assert draws_to_decide(differences) == 18
    assert draws_to_decide(np.array([[1.0, 1.0], [1.0, 1.0]])) == 2
    assert draws_to_decide(np.array([[-1.0, 1.0]])) is None
