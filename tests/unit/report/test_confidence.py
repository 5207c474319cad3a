"""KL by the baseline's entropy and flips by its margin: against loops over the rows."""

import math

import numpy as np
import pytest

from qeval.report import build_report
from qeval.report.confidence import by_entropy, by_margin
from qeval.report.measure_confidence import margins
from qeval.report.run_rows import PairedRun
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters
from tests.fixtures.runs import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return PairedRun(make_run(tmp_path_factory.mktemp("sure")))


@pytest.fixture(scope="module")
def report(run):
    return build_report(run.folder)


def test_fifths_hold_all_positions_and_the_means_of_their_rows(run, report):
    entropy = run.baseline_tokens.of("entropy_nats").tolist()
    rows = run.tokens(run.variant("awq"))
    kl, same = rows.of("kl_nats").tolist(), rows.of("top1_agreement").tolist()
    (awq,) = [v for v in report.variants if v.name == "awq"]
    order = sorted(range(len(kl)), key=lambda i: entropy[i])
    assert sum(bucket.positions for bucket in awq.kl_by_entropy) == len(kl)
    assert sum(bucket.kl_share for bucket in awq.kl_by_entropy) == pytest.approx(1)
    start = 0
    for bucket in awq.kl_by_entropy:
        chosen = order[start : start + bucket.positions]
        start += bucket.positions
        assert abs(bucket.positions - len(kl) / 5) < 1
        assert bucket.kl_nats.value == pytest.approx(sum(kl[i] for i in chosen) / len(chosen))
        assert bucket.top1_agreement.value == pytest.approx(sum(same[i] for i in chosen) / len(chosen))
        assert (bucket.low_nats, bucket.high_nats) == (entropy[chosen[0]], entropy[chosen[-1]])
        assert bucket.kl_nats.low < bucket.kl_nats.value < bucket.kl_nats.high
    means = [bucket.kl_nats.value for bucket in awq.kl_by_entropy]
    assert means == sorted(means)  # in this run KL grows with the entropy


def test_margins_hold_all_flips_in_the_buckets_of_a_loop(run, report):
    (task,) = run.record.tasks
    baseline, rows = run.baseline_items(task), run.items(task, run.variant("rtn"))
    expected: dict[tuple[float, float], list[int]] = {}
    for i, start in enumerate(baseline.starts):
        weights = [math.exp(x) for x in baseline.choices[start : start + 4]]
        first, second = sorted((w / sum(weights) for w in weights), reverse=True)[:2]
        assert margins(baseline)[i] == pytest.approx(first - second)
        edges = next(
            (low, high) for low, high in ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 1.0)) if first - second < high
        )
        counts = expected.setdefault(edges, [0, 0, 0])
        right, now = baseline.pred[i] == baseline.gold[i], rows.pred[i] == rows.gold[i]
        counts[0] += 1
        counts[1] += bool(right and not now)
        counts[2] += bool(now and not right)
    (rtn,) = [v for v in report.variants if v.name == "rtn"]
    buckets = rtn.tasks["mmlu"].flips_by_margin
    found = {(b.low, b.high): [b.questions, b.right_to_wrong, b.wrong_to_right] for b in buckets}
    assert found == expected
    assert all(b.flips.value == pytest.approx((b.right_to_wrong + b.wrong_to_right) / b.questions) for b in buckets)
    assert report.baseline.tasks["mmlu"].flips_by_margin == []


def test_the_tail_over_the_mean_is_resampled_as_one(report):
    generator = np.random.default_rng(0)
    values, clusters = generator.lognormal(size=600), Clusters.of(np.repeat(np.arange(12), 50))
    found = estimates.quantile_over_mean(values, 0.99, clusters, better="neither", seed=3)
    assert found.value == pytest.approx(np.sort(values)[math.ceil(0.99 * 600) - 1] / values.mean())
    scaled = estimates.quantile_over_mean(7 * values, 0.99, clusters, better="neither", seed=3)
    assert (scaled.low, scaled.high) == pytest.approx((found.low, found.high))
    assert found.low < found.value < found.high
    awq = report.variants[0].metrics
    assert awq["kl_nats_p99_over_mean"].value == pytest.approx(awq["kl_nats_p99"].value / awq["kl_nats"].value)


def test_the_tables_have_a_row_for_every_bucket(report):
    (entropy,) = by_entropy(report)
    (margin,) = by_margin(report, report.tasks[0])
    assert len(entropy.rows) == sum(len(v.kl_by_entropy) for v in report.variants) == 5 * len(report.variants)
    assert len(margin.rows) == sum(len(v.tasks["mmlu"].flips_by_margin) for v in report.variants)
