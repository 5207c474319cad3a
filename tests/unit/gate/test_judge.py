"""The gate on finished runs: pass, fail, inconclusive, broken; never a pass by accident."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from qeval.gate.bounded_metrics import Figures
from qeval.gate.judge import decide, judge
from qeval.gate.metrics import kind_of
from qeval.gate.policy import Policy
from qeval.report.run_rows import PairedRun
from tests.fixtures.gate import DEMO, INT4, INT8, RELEASE, gate_run, told
from tests.fixtures.runs import Made, Shape, make_run, reseal


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("gate") / "run", DEMO)


def policy(*rules, **more):
    return Policy.model_validate({"name": "p", "rules": list(rules), **more})


def at_most(metric, margin, **more):
    return {"metric": metric, "at_most": margin, **more}


def only(folder, *rules, names=(INT8.name,), **more):
    (variant,) = judge(folder, policy(*rules, **more), names).variants
    return variant.rules[0] if variant.rules else variant


def test_the_rows_have_the_demos_figures(demo):
    paired = PairedRun(demo)
    means = {record.name: Figures(paired, record).of("kl_nats").value for record in paired.done}
    assert means["rtn:int8-channel"] == pytest.approx(0.0027, abs=0.0005)
    assert means["rtn"] == pytest.approx(0.5, abs=0.1)


def test_int8_per_channel_passes_release_with_code_0(demo, capfd):
    code, out, err = told(capfd, demo, "--policy", RELEASE, "--variant", "rtn:int8-channel")
    assert (code, err) == (0, "")
    assert "release: pass (exit code 0)" in out
    assert "(counts as pass)" in out


def test_int4_rtn_fails_release_with_code_1(demo, capfd):
    code, out, err = told(capfd, demo, "--policy", RELEASE, "--variant", "rtn")
    assert (code, err) == (1, "")
    assert "release: fail (exit code 1)" in out


def test_all_variants_must_pass_unless_one_is_named(demo, capfd):
    assert told(capfd, demo, "--policy", RELEASE)[0] == 1


def test_accuracy_at_chance_is_inconclusive_and_counts_as_the_policy_says(demo):
    rule = at_most("mmlu_acc_drop", "90 points")
    found = only(demo, rule)
    assert (found.outcome, found.counts_as, found.more_rows) == ("inconclusive", "inconclusive", None)
    assert "includes chance (25%)" in found.why
    assert only(demo, rule | {"when_at_chance": "pass"}).counts_as == "pass"
    assert only(demo, rule | {"when_inconclusive": "fail"}).counts_as == "fail"
    assert judge(demo, policy(rule), [INT8.name]).exit_code == 4
    assert only(demo, at_most("mmlu_flips", "50 %")).outcome == "pass"  # flips still speak


def test_a_verdict_is_from_the_bound_and_not_from_the_mean(demo):
    value = only(demo, at_most("kl_nats", "1 nats")).value
    assert only(demo, at_most("kl_nats", f"{value * 1.0001} nats")).outcome == "inconclusive"
    assert only(demo, at_most("kl_nats", f"{value * 0.9999} nats")).outcome == "inconclusive"
    assert only(demo, at_most("kl_nats", f"{value * 2} nats")).outcome == "pass"
    assert only(demo, at_most("kl_nats", f"{value / 2} nats")).outcome == "fail"


def test_the_bound_equals_the_t_bound_of_window_means(demo):
    paired = PairedRun(demo)
    rows = paired.tokens(paired.variant(INT8.name))
    means = rows.of("kl_nats").reshape(8, 1024).mean(axis=1)
    found = only(demo, at_most("kl_nats", "0.05 nats"), confidence=0.9)
    expected = means.mean() + scipy_stats.t.ppf(0.9, 7) * scipy_stats.sem(means)
    assert found.high == pytest.approx(expected)
    assert (found.n, found.clusters, found.rows) == (8192, 8, "tokens")


def test_an_inconclusive_rule_says_what_would_decide_it_and_what_could_be_seen(tmp_path):
    folder = gate_run(tmp_path, variants=(INT4,), skill=2.0)
    value = only(folder, at_most("mmlu_acc_drop", "50 points"), names=()).value
    found = only(folder, at_most("mmlu_acc_drop", f"{100 * value + 1:.2f} points"), names=())
    assert found.outcome == "inconclusive"
    assert found.more_rows > 0
    assert 0 < found.smallest_effect < 0.2
    assert f"about {found.more_rows:,} more questions would decide it" in found.why
    assert "the smallest effect that this run could have seen is" in found.why
    assert "a rough bound, from 12 subjects" in found.why


def test_a_drop_tells_flips_both_ways_and_mcnemars_test(tmp_path):
    folder = gate_run(tmp_path, variants=(INT4,), skill=2.0)
    paired = PairedRun(folder)
    task = paired.record.tasks[0]
    before, now = paired.baseline_items(task).acc, paired.items(task, paired.done[0]).acc
    lost, won = int((before > now).sum()), int((before < now).sum())
    p = scipy_stats.binomtest(lost, lost + won).pvalue
    found = only(folder, at_most("mmlu_acc_drop", "90 points"), names=())
    assert found.value == pytest.approx((lost - won) / 240)
    assert f"{lost} lost and {won} won (McNemar's exact test: p = {p:.2g})" in found.why


def test_a_tail_that_the_rows_do_not_reach_is_inconclusive_and_says_how_many_would(tmp_path):
    folder = gate_run(tmp_path, windows=12, length=64)
    found = only(folder, at_most("kl_nats_p99_9", "2 nats"))
    assert (found.outcome, found.high) == ("inconclusive", None)
    assert "no bound from 768 tokens: too few lie that far out" in found.why
    assert found.more_rows > 2000
    larger = gate_run(tmp_path / "larger", windows=-(-(768 + found.more_rows) // 64) + 1, length=64)
    assert only(larger, at_most("kl_nats_p99_9", "2 nats")).outcome == "pass"


def test_it_says_in_words_why(tmp_path):
    folder = gate_run(tmp_path, variants=(INT4,), skill=2.0)
    why = only(folder, at_most("mmlu_acc_drop", "1.0 points"), names=()).why
    assert why.startswith("drop of ")
    assert " points, at most " in why or " points, at least " in why
    assert "with 95 % confidence: over 1.0" in why


def all_right(_, columns):
    return columns | {"pred": columns["gold"], "acc": np.ones(len(columns["item"]))}


def test_no_flip_at_all_is_no_proof_of_none(tmp_path):
    folder = make_run(tmp_path / "few", Shape(variants=(INT8,), questions=2, edits={"items": all_right}))
    found = only(folder, at_most("mmlu_flips", "4 %"))
    assert (found.value, found.outcome) == (0, "inconclusive")
    assert found.high > 0.1
    assert only(folder, at_most("mmlu_acc_drop", "1 points")).high > 0.1


def test_every_metric_has_a_figure(demo):
    names = [
        "kl_nats",
        "kl_nats_p50",
        "kl_nats_p90",
        "kl_nats_p99",
        "kl_nats_p99_9",
        "reverse_kl_nats",
        "kl_abs_modelopt",
    ]
    names += ["nll_diff_nats", "mmlu_choice_kl_nats"]
    rules = [at_most(name, "5 nats") for name in names] + [at_most("ppl_increase", "500 %")]
    rules += [at_most("mmlu_flips", "99 %"), at_most("mmlu_right_to_wrong", "99 %"), at_most("size_bytes", "999 MB")]
    rules += [at_most("bits_per_weight", "16 bits"), {"metric": "size_ratio", "at_least": "1 times"}]
    rules += [{"metric": "top1_agreement", "at_least": "1 %"}]
    (variant,) = judge(demo, policy(*rules), [INT8.name]).variants
    assert {rule.metric: rule.outcome for rule in variant.rules} == {rule["metric"]: "pass" for rule in rules}
    for rule in variant.rules:
        assert rule.low <= rule.value <= rule.high


def test_agreement_is_limited_from_below(demo):
    value = only(demo, {"metric": "top1_agreement", "at_least": "1 %"}).value
    assert only(demo, {"metric": "top1_agreement", "at_least": f"{100 * value - 5} %"}).outcome == "pass"
    assert only(demo, {"metric": "top1_agreement", "at_least": f"{100 * value} %"}).outcome == "inconclusive"
    failed = only(demo, {"metric": "top1_agreement", "at_least": "99.9 %"}, names=[INT4.name])
    assert failed.outcome == "fail"
    assert "under 99.9" in failed.why


def test_a_missing_task_is_broken_and_named(tmp_path, capfd):
    folder = gate_run(tmp_path, metrics=("kl", "ppl"))
    code, out, _ = told(capfd, folder, "--policy", RELEASE)
    assert code == 3
    assert "--tasks kl,ppl,mmlu" in " ".join(out.split())
    assert judge(folder, policy(at_most("arc_easy_flips", "4 %"))).outcome == "broken"


def test_a_metric_that_was_not_asked_for_is_broken_though_its_rows_are_there(tmp_path):
    folder = gate_run(tmp_path, metrics=("kl",))
    found = only(folder, at_most("ppl_increase", "3 %"))
    assert found.outcome == "broken"
    assert "--tasks kl,ppl" in found.why


def without(kind, keep):
    return {kind: lambda name, columns: columns if name == "baseline" else _kept(columns, keep)}


def _kept(columns, keep):
    return {name: list(np.asarray(column, dtype=object)[:keep]) for name, column in columns.items()}


def test_missing_rows_are_counted_and_broken(tmp_path):
    tokens = gate_run(tmp_path / "tokens", edits=without("tokens", -3))
    found = only(tokens, at_most("kl_nats", "5 nats"))
    assert found.outcome == "broken"
    assert "2557 token rows and the baseline 2560" in found.why
    items = gate_run(tmp_path / "items", edits={"items": _shorter})
    assert "237 answers of 'mmlu' and the run asked 240" in only(items, at_most("mmlu_flips", "90 %")).why


def _shorter(name, columns):
    return columns if name == "baseline" else {key: column[:-3] for key, column in columns.items()}


def test_no_rows_at_all_are_broken(tmp_path):
    folder = gate_run(tmp_path, edits=without("tokens", 0))
    verdict = judge(folder, policy(at_most("kl_nats", "5 nats")))
    assert verdict.exit_code == 3
    assert "has no token rows" in verdict.variants[0].rules[0].why


def test_zero_questions_are_broken(tmp_path):
    folder = make_run(tmp_path / "run", Shape(variants=(INT8,)))
    record = json.loads((folder / "run.json").read_text())
    record["tasks"][0]["items"] = 0
    reseal(folder, record)
    found = only(folder, at_most("mmlu_flips", "4 %"))
    assert (found.outcome, found.why) == ("broken", "The run scored no question of 'mmlu'.")


def test_a_value_that_is_not_finite_is_broken_and_counted(tmp_path):
    def edit(name, columns):
        return columns if name == "baseline" else columns | {"kl_nats": [float("nan"), *columns["kl_nats"][1:]]}

    found = only(gate_run(tmp_path, edits={"tokens": edit}), at_most("kl_nats", "5 nats"))
    assert found.outcome == "broken"
    assert "1 of 2560 values are not finite" in found.why


def changed(folder, change):
    path = folder / "run.json"
    record = json.loads(path.read_text())
    change(record)
    return reseal(folder, record)


def test_a_failed_variant_is_broken_and_never_a_pass(tmp_path, capfd):
    folder = gate_run(tmp_path, variants=(INT8, INT4))
    changed(folder, lambda r: r["variants"][1].update(status="failed", error="no memory"))
    code, out, _ = told(capfd, folder, "--policy", RELEASE)
    assert code == 3
    assert "'rtn' failed in this run: no memory" in out
    code, _, _ = told(capfd, folder, "--policy", RELEASE, "--variant", "rtn")
    assert code == 3


def test_a_run_without_variants_is_broken(tmp_path, capfd):
    folder = gate_run(tmp_path)
    changed(folder, lambda r: r.update(variants=[]))
    code, out, err = told(capfd, folder, "--policy", RELEASE)
    assert (code, out) == (3, "")
    assert "has no variant: there is nothing to gate" in err


def test_a_run_of_another_version_is_broken(tmp_path, capfd):
    folder = gate_run(tmp_path)
    changed(folder, lambda r: r.update(run_version=3))
    code, _, err = told(capfd, folder, "--policy", RELEASE)
    assert code == 3
    assert "of another version" in err


def test_wrong_use_is_code_2(demo, tmp_path, capfd):
    assert told(capfd, tmp_path, "--policy", RELEASE)[0] == 2
    code, _, err = told(capfd, demo, "--policy", RELEASE, "--variant", "rtm")
    assert code == 2
    assert "Unknown variant" in err
    assert "nearest: rtn" in err
    assert told(capfd, demo, "--policy", tmp_path / "none.yaml")[0] == 2
    assert told(capfd, demo)[0] == 2


def test_a_variant_that_no_rule_is_about_does_not_pass(demo):
    verdict = judge(demo, policy(at_most("kl_nats", "5 nats", variants=["awq*"])), [INT8.name])
    assert verdict.exit_code == 3
    assert "nothing was checked" in verdict.variants[0].error
    assert verdict.notes == ("About none of the gated variants: kl_nats at most 5 nats.",)


FLOOR = Made("baseline:bf16", "none", "", "", 16.0, 0.02)


@pytest.fixture(scope="module")
def floored(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("floor") / "run", Shape(variants=(INT8, INT4, FLOOR), windows=40))
    return changed(folder, lambda r: r["variants"][2].update(role="floor"))


def test_the_noise_floor_is_never_gated(floored, capfd):
    verdict = judge(floored, policy(at_most("kl_nats", "5 nats")))
    assert [variant.name for variant in verdict.variants] == [INT8.name, INT4.name]
    code, _, err = told(capfd, floored, "--policy", RELEASE, "--variant", FLOOR.name)
    assert code == 2
    assert "noise floor" in err


def test_an_effect_under_the_noise_floor_is_neither_a_fail_nor_better(floored):
    strict = only(floored, at_most("kl_nats", "0.0001 nats"))
    assert (strict.outcome, strict.counts_as) == ("inconclusive", "inconclusive")
    assert "no larger than the noise floor of" in strict.why
    assert only(floored, at_most("kl_nats", "0.0001 nats"), names=[INT4.name]).outcome == "fail"
    assert only(floored, {"metric": "top1_agreement", "at_least": "99.99 %"}).outcome == "inconclusive"
    better = only(floored, at_most("ppl_increase", "-0.0001 %"))
    assert better.outcome in ("inconclusive", "fail")
    within = only(floored, at_most("kl_nats", "0.05 nats"))
    assert within.outcome == "pass"
    assert "noise floor" in within.why


def test_a_noise_floor_that_failed_is_told(tmp_path):
    folder = gate_run(tmp_path, variants=(INT8, FLOOR))
    changed(folder, lambda r: r["variants"][1].update(role="floor", status="failed", error="no bf16 here"))
    verdict = judge(folder, policy(at_most("kl_nats", "5 nats")))
    assert verdict.outcome == "pass"
    assert verdict.notes == ("The noise floor 'baseline:bf16' failed, so no effect is held against it: no bf16 here",)


@given(st.floats(1e-4, 0.02), st.floats(1.0, 3.0))
def test_a_wider_margin_never_makes_a_verdict_worse(demo_kl, margin, wider):
    order = ["fail", "inconclusive", "pass"]
    kind, bound = kind_of("kl_nats"), demo_kl.bounded.bounds(0.95)
    tight, loose = (decide(kind, demo_kl, bound, limit) for limit in (margin, margin * wider))
    assert order.index(tight) <= order.index(loose)


@pytest.fixture(scope="module")
def demo_kl(demo):
    paired = PairedRun(demo)
    return Figures(paired, paired.variant(INT8.name)).of("kl_nats")


def test_one_variant_of_several_is_enough_where_the_policy_says_so_at_holms_level(demo):
    rule = at_most("kl_nats", "0.05 nats")
    every, one = judge(demo, policy(rule)), judge(demo, policy(rule, require="any"))
    assert (every.outcome, one.outcome) == ("fail", "pass")
    assert "no correction" in every.correction
    assert "Holm" in one.correction
    levels = {variant.name: variant.rules[0].confidence for variant in one.variants}
    assert levels == {INT4.name: pytest.approx(0.95), INT8.name: pytest.approx(0.975)}  # rtn, once the other passed
    alone = judge(demo, policy(rule, require="any"), [INT8.name])
    assert alone.variants[0].rules[0].confidence == pytest.approx(0.95)
    assert "Holm" not in alone.correction


@pytest.mark.parametrize(
    ("metric", "low", "high", "outcome"),
    [
        ("kl_nats", 0.01, 0.05, "pass"),  # a bound that ends on the margin keeps to it
        ("kl_nats", 0.01, np.nextafter(0.05, 1), "inconclusive"),
        ("kl_nats", 0.05, 0.06, "inconclusive"),
        ("kl_nats", np.nextafter(0.05, 1), 0.06, "fail"),
        ("size_ratio", 0.05, 0.06, "pass"),
        ("size_ratio", np.nextafter(0.05, 0), 0.06, "inconclusive"),
        ("size_ratio", 0.01, 0.05, "inconclusive"),
        ("size_ratio", 0.01, np.nextafter(0.05, 0), "fail"),
        ("kl_nats", None, None, "inconclusive"),
    ],
)
def test_a_bound_on_the_margin_keeps_to_it(demo_kl, metric, low, high, outcome):
    assert decide(kind_of(metric), demo_kl, (low, high), 0.05) == outcome
