"""The expected calibration error against its definition, and against probabilities that are right."""

import numpy as np
import pytest

from qeval.stats.bootstrap import Clusters
from qeval.stats.calibration import expected_calibration_error


def test_an_interval_covers_what_resampling_by_hand_finds():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.25, 1, 400)
    right = (random.uniform(size=400) < confidence**2).astype(float)  # too sure of itself
    clusters = Clusters.of(np.repeat(np.arange(40), 10))
    found = expected_calibration_error(confidence, right, clusters, seed=0)
    by_hand = []
    for _ in range(2000):
        rows = np.concatenate([np.arange(10) + 10 * pick for pick in random.integers(40, size=40)])
        places = np.minimum((confidence[rows] * 15).astype(int), 14)
        gaps = [abs((right[rows] - confidence[rows])[places == place].sum()) for place in range(15)]
        by_hand.append(sum(gaps) / len(rows))
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert 0.1 < found.value < 0.25


def test_probabilities_that_are_right_have_an_error_that_shrinks_with_the_rows():
    errors = []
    for rows in (1_000, 100_000):
        random = np.random.default_rng(1)
        confidence = random.uniform(size=rows)
        right = random.uniform(size=rows) < confidence
        errors.append(
            expected_calibration_error(
                confidence,
                right,
                Clusters.single_rows(rows) if rows < 2000 else Clusters.of(np.arange(rows) // 100),
                seed=0,
            ).value
        )
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.01


def test_no_rows_and_one_cluster():
    empty = expected_calibration_error([], [], Clusters.of([]), seed=0)
    assert (empty.value, empty.n) == (None, 0)
    one = expected_calibration_error([1.0, 0.5], [1, 0], Clusters.of([0, 0]), seed=0)
    assert (one.value, one.low, one.high) == (0.25, None, None)
