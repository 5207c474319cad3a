"""A policy is read strictly: what it cannot mean is refused with what would be right."""

from pathlib import Path

import pytest

from qeval.errors import UsageError
from qeval.gate.metrics import METRICS, TASK_METRICS, kind_of, margin_of, split
from qeval.gate.policy import load_policy, policy_schema_json
from qeval.paths import shipped

RULE = "  - {metric: kl_nats, at_most: 0.05 nats}\n"


def written(folder, text):
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder, text):
    with pytest.raises(UsageError) as told:
        load_policy(written(folder, text))
    assert "policy.yaml" in str(told.value)
    return str(told.value)


def rule(folder, words):
    return refused(folder, f"name: p\nrules:\n{RULE}  - {{{words}}}\n")


def test_the_schema_file_is_what_the_module_says():
    told = shipped("configs/gate.schema.json").read_text(encoding="utf-8")
    assert told == policy_schema_json(), "Write configs/gate.schema.json again with `python -m qeval.gate.policy`."


def test_the_release_policy_holds_the_margins_that_it_names():
    policy = load_policy(shipped("configs/gates/release.yaml"))
    margins = {(rule.metric, rule.margin) for rule in policy.rules}
    assert {("kl_nats", 0.05), ("kl_nats_p99_9", 2.0), ("ppl_increase", 0.03), ("mmlu_flips", 0.1)} <= margins
    assert ("mmlu_acc_drop", 0.01) in margins
    assert policy.confidence == 0.95


def test_a_shipped_policy_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped_one = load_policy(Path("configs/gates/release.yaml"))
    (tmp_path / "configs" / "gates").mkdir(parents=True)
    (tmp_path / "configs" / "gates" / "release.yaml").write_text(f"name: mine\nrules:\n{RULE}")
    assert (shipped_one.name, load_policy(Path("configs/gates/release.yaml")).name) == ("release", "mine")


def test_an_unknown_metric_lists_the_nearest(tmp_path):
    said = rule(tmp_path, "metric: kl_nat, at_most: 0.05 nats")
    assert "rule 2: Unknown metric 'kl_nat'; nearest: kl_nats" in said


def test_an_unknown_key_lists_the_nearest(tmp_path):
    assert "rules.2.at_mots: Unknown key 'at_mots'; nearest: at_most" in rule(
        tmp_path, "metric: kl_nats, at_mots: 1 nats"
    )
    assert "confidense: Unknown key 'confidense'; nearest: confidence" in refused(
        tmp_path, f"name: p\nconfidense: 0.9\nrules:\n{RULE}"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("metric: mmlu_acc_drop, at_most: 1.0 %", "must be a number of points, such as '1.5 points', not '1.0 %'"),
        ("metric: mmlu_flips, at_most: 0.04", "a margin is a number and its unit in words"),
        ("metric: mmlu_flips, at_most: '0.04'", "must be a number of %"),
        ("metric: kl_nats, at_most: nan nats", "must be a number of nats"),
        ("metric: kl_nats, at_most: inf nats", "must be a number of nats"),
        ("metric: kl_nats, at_most: ''", "must be a number of nats"),
        ("metric: kl_nats, at_most: -0.1 nats", "cannot be below zero"),
        ("metric: kl_nats, at_least: 0.1 nats", "is limited by at_most, not by its opposite"),
        ("metric: size_ratio, at_most: 2 times", "is limited by at_least"),
        ("metric: kl_nats", "needs at_most"),
        ("metric: kl_nats, at_most: 1 nats, at_least: 1 nats", "needs at_most, and nothing beside it"),
        ("metric: kl_nats, at_most: 1 nats, when_at_chance: pass", "when_at_chance is for accuracy"),
        ("metric: kl_nats, at_most: 1 nats, confidence: 95", "rules.2.confidence"),
        ("metric: kl_nats, at_most: 1 nats, when_inconclusive: maybe", "rules.2.when_inconclusive"),
        ("metric: kl_nats, at_most: 1 nats, variants: []", "rules.2.variants"),
        ("at_most: 1 nats", "rules.2.metric"),
    ],
)
def test_what_a_rule_cannot_mean_is_refused(tmp_path, words, said):
    assert said in rule(tmp_path, words)


def test_a_policy_without_rules_is_no_policy(tmp_path):
    assert "rules" in refused(tmp_path, "name: p\nrules: []\n")
    assert "rules" in refused(tmp_path, "name: p\n")
    for text in ("just words", "", "- 1"):
        assert "it must hold a mapping with 'name' and 'rules'" in refused(tmp_path, text)
    assert "is not valid YAML" in refused(tmp_path, "name: [")
    with pytest.raises(UsageError, match="no policy"):
        load_policy(tmp_path / "nowhere.yaml")


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    assert "'at_most' is given twice (line 4)" in rule(tmp_path, "metric: kl_nats, at_most: 1 nats, at_most: 9 nats")


def test_a_drop_may_be_asked_to_be_a_gain(tmp_path):
    policy = load_policy(written(tmp_path, "name: p\nrules:\n  - {metric: mmlu_acc_drop, at_most: -0.5 points}\n"))
    assert policy.rules[0].margin == pytest.approx(-0.005)


def test_every_metric_of_the_table_can_be_named_with_its_unit():
    for name, kind in [*METRICS.items(), *((f"hella_swag_{name}", kind) for name, kind in TASK_METRICS.items())]:
        assert kind_of(name) == kind
        assert margin_of(f"2 {kind.unit}", kind, name) > 0
    assert split("hella_swag_right_to_wrong") == ("hella_swag", "right_to_wrong")
    with pytest.raises(UsageError, match="Unknown metric '_flips'"):
        split("_flips")


def test_a_rule_holds_for_the_variants_that_it_names(tmp_path):
    text = "name: p\nrules:\n  - {metric: kl_nats, at_most: 1 nats, variants: [rtn, '*int8*']}\n"
    (only,) = load_policy(written(tmp_path, text)).rules
    assert [only.holds_for(name) for name in ("rtn", "rtn:int8-channel", "rtn@ort", "awq")] == [
        True,
        True,
        False,
        False,
    ]
