"""Rules on greedy continuations: bounds by prompts against scipy's, and never a pass by accident."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qeval.gate.bounded_metrics import Figures
from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.report import build_report
from qeval.report.run_rows import PairedRun
from qeval.stats import bounds
from qeval.stats.bootstrap import Clusters
from tests.fixtures.gate import INT4, INT8, told
from tests.fixtures.runs import GENERATED, PROMPTS, Shape, make_run, reseal

METRICS = ("kl", "drift")
EXACT = replace(INT8, name="exact", level=0.0)
FLOOR = {"role": "floor", "method": "float", "name": "floor"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    shape = Shape(variants=(INT4, INT8, EXACT), metrics=METRICS)
    return make_run(tmp_path_factory.mktemp("drift") / "run", shape)


def policy(*rules, **more):
    made = [dict(zip(("metric", side, "unit"), (metric, margin), strict=False)) for metric, side, margin in rules]
    return Policy.model_validate({"name": "p", "rules": made, **more})


def only(folder, name, metric, side, margin, **more):
    ((rule,),) = [variant.rules for variant in judge(folder, policy((metric, side, margin), **more), [name]).variants]
    return rule


def test_the_figures_are_the_reports(run):
    shown = {variant.name: variant.metrics for variant in build_report(run).variants}
    paired = PairedRun(run)
    for record in paired.done:
        for metric in ("drift_equal", "drift_diverged", "drift_first_tokens"):
            assert Figures(paired, record).of(metric).value == pytest.approx(shown[record.name][metric].value)
    assert 0 < shown["rtn"]["drift_diverged"].value < 1


@pytest.mark.parametrize("name", ["rtn", "exact"])
def test_the_share_of_prompts_that_leave_has_clopper_and_pearsons_bound(run, name):
    paired = PairedRun(run)
    rows = paired.drift(paired.variant(name))
    left = int((rows.pred != rows.tokens).any(axis=1).sum())
    found = only(run, name, "drift_diverged", "at_most", "99 %")
    assert (found.n, found.clusters, found.rows) == (PROMPTS, PROMPTS, "prompts")
    assert found.high == pytest.approx(scipy_stats.beta.ppf(0.95, left + 1, PROMPTS - left))
    assert found.low == pytest.approx(scipy_stats.beta.ppf(0.05, left, PROMPTS - left + 1) if left else 0.0)


def test_equal_tokens_are_bounded_by_prompts_and_not_by_tokens(run):
    found = only(run, "rtn", "drift_equal", "at_least", "50 %")
    assert (found.n, found.clusters, found.rows) == (PROMPTS * GENERATED, PROMPTS, "tokens")
    rows = PairedRun(run).drift(PairedRun(run).variant("rtn"))
    equal = rows.pred == rows.tokens
    alone = scipy_stats.beta.ppf(0.05, equal.sum(), (~equal).sum() + 1)
    assert found.low < alone < found.value


def test_a_variant_that_never_leaves_passes_as_far_as_its_prompts_can_tell(run):
    most = 1 - 0.05 ** (1 / PROMPTS)  # what no divergence in 32 prompts excludes
    rule = ("drift_diverged", "at_most")
    assert only(run, "exact", *rule, f"{100 * most + 0.01:.4f} %").outcome == "pass"
    assert only(run, "exact", *rule, f"{100 * most - 0.01:.4f} %").outcome == "inconclusive"
    found = only(run, "exact", "drift_first_tokens", "at_least", "64 tokens")
    assert (found.value, found.high, found.outcome) == (GENERATED, GENERATED, "inconclusive")
    assert found.low == pytest.approx(GENERATED * (1 - most))
    assert only(run, "exact", "drift_first_tokens", "at_least", "50 tokens").outcome == "pass"


def test_what_leaves_too_soon_fails_and_the_words_say_it(run, capfd, tmp_path):
    found = only(run, "rtn", "drift_first_tokens", "at_least", "63.5 tokens")
    assert found.outcome == "fail"
    assert "continuation before leaving the baseline's of" in found.why
    assert "with 95 % confidence: under 63.5" in found.why
    path = tmp_path / "p.yaml"
    path.write_text("name: p\nrules: [{metric: drift_equal, at_least: 99.99 %, variants: [rtn]}]\n")
    outputs = ["--junit", tmp_path / "j.xml", "--markdown", tmp_path / "m.md"]
    code, out, _ = told(capfd, run, "--policy", path, "--variant", "rtn", "--json", *outputs)
    (rule,) = json.loads(out)["variants"][0]["rules"]
    assert (code, rule["metric"], rule["unit"], rule["outcome"]) == (1, "drift_equal", "%", "fail")
    assert "tokens equal along continuations of" in (tmp_path / "m.md").read_text()
    assert "drift_equal at least 99.99 %" in (tmp_path / "j.xml").read_text()


def test_bounds_of_a_part_hold_the_truth_whatever_its_values_look_like():
    rng = np.random.default_rng(4)
    draws = {"ends": lambda: rng.random(24) < 0.9, "flat": lambda: rng.random(24), "near": lambda: rng.beta(30, 2, 24)}
    means = {"ends": 0.9, "flat": 0.5, "near": 30 / 32}
    for name, draw in draws.items():
        lows = [bounds.part_of(draw().astype(float), Clusters.single_rows(24), 64).bounds(0.95).low for _ in range(400)]
        assert np.mean(np.asarray(lows) <= 64 * means[name]) >= 0.93, name


def test_an_effect_no_larger_than_the_floors_never_fails(tmp_path):
    folder = make_run(tmp_path / "run", Shape(variants=(INT4, replace(INT4, name="floor")), metrics=METRICS))
    record = json.loads((folder / "run.json").read_text())
    record["variants"][1] |= FLOOR
    reseal(folder, record)
    rows = PairedRun(folder)
    figures = {each.name: Figures(rows, each).of("drift_first_tokens") for each in rows.done}
    assert figures["floor"].effect == pytest.approx(GENERATED - figures["floor"].value)
    found = only(folder, "rtn", "drift_first_tokens", "at_least", "63.9 tokens")
    assert found.floor == pytest.approx(figures["floor"].effect)
    assert (found.outcome == "fail") == (figures["rtn"].effect > figures["floor"].effect)


def test_a_run_without_continuations_is_broken_and_says_what_to_do(tmp_path):
    folder = make_run(tmp_path / "run", Shape(variants=(INT8,), metrics=("kl",)))
    found = only(folder, INT8.name, "drift_equal", "at_least", "90 %")
    assert found.outcome == "broken"
    assert "did not measure 'drift'; run it again with --tasks kl,drift" in found.why


def test_distances_that_are_not_finite_are_never_a_pass(tmp_path):
    def spoil(name, columns):
        if name != "baseline":
            columns["kl_nats"][7] = np.nan
        return columns

    folder = make_run(tmp_path / "run", Shape(variants=(INT8,), metrics=METRICS, edits={"drift": spoil}))
    found = only(folder, INT8.name, "drift_diverged", "at_most", "100 %")
    assert found.outcome == "broken"
    assert "1 of 2048 values are not finite" in found.why
