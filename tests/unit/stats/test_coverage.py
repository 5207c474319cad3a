"""How often the interval holds the truth, where it is known: few windows of heavy-tailed tokens."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks import coverage as benchmark
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


@pytest.mark.parametrize("kind", list(benchmark.settings()))
def test_bounds_of_a_gate_hold_the_truth_from_thirty_clusters_on(kind):
    setting = benchmark.settings()[kind]
    for method, share in benchmark.coverage(setting, 30, 250).items():
        assert share >= 0.90 or method in setting.unused, method


def test_the_coverage_benchmark_prints_a_table_and_says_when_it_misses(capsys, monkeypatch):
    def never(values, clusters):
        del values, clusters
        return bootstrap.Interval(9.0, 9.1)

    few = ["--repeats", "20", "--clusters", "30"]
    assert benchmark.main(few) in (0, 1)
    assert "mean KL, heavy tail   closed form              30" in capsys.readouterr().out
    broken = {"none": benchmark.Setting(benchmark.kl, benchmark.TOKENS, 1.0, {"never": never})}
    monkeypatch.setattr(benchmark, "settings", lambda: broken)
    assert benchmark.main(few) == 1
    assert "0.0%  MISSED" in capsys.readouterr().out
