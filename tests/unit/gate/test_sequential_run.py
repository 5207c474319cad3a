"""Run and gate in one go, on a tiny model: rows in a random order, an end as soon as all is decided."""

import json

import numpy as np
import pytest

from qeval.cli.app import run_program
from qeval.compare.plan import make_plan
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.task_choice import TaskChoice
from qeval.config import Defaults, parse_method
from qeval.errors import QevalError
from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.gate.sequential import Drawn, look
from qeval.gate.sequential_run import DrawnPart, Pool, tasks_of
from qeval.report import build_report
from qeval.report.run_rows import PairedRun
from qeval.stats.sequential import decide_bounded, decide_sums
from tests.fixtures.bench import Bench, text
from tests.fixtures.runs import Made, Shape, make_run

WINDOWS, QUESTIONS = 60, 120
CLEAR = "kl_nats at_most 5 nats, kl_nats_p99 at_most 9 nats, ppl_increase at_most 100 %, size_ratio at_least 1.1 times"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Sixty windows and 120 questions of two subjects."""
    made = Bench(tmp_path_factory.mktemp("live"))
    made.corpus.write_text(text(400), encoding="utf-8")
    for path in made.mmlu.glob("test/*.csv"):
        asked = [f"What is {i} in {path.stem}?,None,2.50,x{i},NA,{'ABCD'[i % 4]}" for i in range(QUESTIONS // 2)]
        path.write_text("\n".join(asked) + "\n", encoding="utf-8")
    return made


def gated(bench, capfd, rules, *more, out="gate"):
    """The exit code, the verdict and the folder of a gate in one go."""
    policy = bench.folder / "policy.yaml"
    lines = [dict(zip(("metric", "side", "margin"), rule.split(maxsplit=2), strict=True)) for rule in rules.split(", ")]
    listed = [f"  - {{metric: {line['metric']}, {line['side']}: {line['margin']}}}" for line in lines]
    policy.write_text("\n".join(["name: p", "rules:", *listed]) + "\n", encoding="utf-8")
    flags = bench.arguments(methods=None, tasks=None, max_windows=str(WINDOWS), out=str(bench.folder / out))
    capfd.readouterr()
    code = run_program(["gate", "--policy", str(policy), "--method", "rtn:g32", *flags, "--json", "--quiet", *more])
    heard = capfd.readouterr()
    return code, json.loads(heard.out) if heard.out else heard.err, bench.folder / out


def test_continuations_are_judged_at_the_first_look_and_hold_nothing_up(bench, capfd):
    rules = "drift_diverged at_most 99.99 %, drift_equal at_least 1 %, drift_first_tokens at_least 63 tokens"
    code, verdict, folder = gated(bench, capfd, rules, out="drift")
    found = {rule["metric"]: rule for rule in verdict["variants"][0]["rules"]}
    assert found["drift_equal"]["outcome"] == "pass"
    for metric, rule in found.items():
        again = (
            judge(folder, Policy.model_validate({"name": "p", "rules": [asked(metric, rules)]})).variants[0].rules[0]
        )
        assert (rule["outcome"], rule["low"], rule["high"]) == (again.outcome, again.low, again.high)
    assert code == verdict["exit_code"]
    assert "all 32 prompts to continue" in verdict["notes"][0]


def asked(metric, rules):
    side, margin = next(rule.split(maxsplit=2)[1:] for rule in rules.split(", ") if rule.startswith(metric))
    return {"metric": metric, side: margin}


def outcomes(verdict):
    return {rule["metric"]: rule["outcome"] for rule in verdict["variants"][0]["rules"]}


def test_a_clear_case_ends_early_and_leaves_a_finished_run(bench, capfd):
    code, verdict, folder = gated(bench, capfd, CLEAR)
    assert (code, verdict["outcome"]) == (0, "pass")
    assert set(outcomes(verdict).values()) == {"pass"}
    record = PairedRun(folder).record
    assert 25 <= record.protocol.windows < WINDOWS
    assert f"{record.protocol.windows} of {WINDOWS} windows" in verdict["notes"][0]
    assert build_report(folder).variants[0].metrics["kl_nats"].clusters == record.protocol.windows
    seen = PairedRun(folder).baseline_tokens.windows
    assert set(seen) != set(range(record.protocol.windows))  # a random part, not the first


def test_the_same_command_goes_on_from_what_is_there(bench, capfd):
    _, first, folder = gated(bench, capfd, CLEAR)
    made = {path: path.stat().st_mtime_ns for path in (folder / "rows").rglob("*.parquet")}
    code, again, _ = gated(bench, capfd, CLEAR)
    assert (code, again) == (0, first)
    assert {path: path.stat().st_mtime_ns for path in (folder / "rows").rglob("*.parquet")} == made


def test_a_streamed_gate_comes_to_the_same_verdict(bench, capfd):
    code, whole, _ = gated(bench, capfd, CLEAR, "--method", "awq:g32", out="whole")
    assert code == 0
    code, streamed, _ = gated(
        bench, capfd, CLEAR, "--method", "awq:g32", "--stream", "--max-memory", "64MiB", out="streamed"
    )
    assert code == 0
    figures = [[rule["value"] for rule in each["variants"][0]["rules"]] for each in (whole, streamed)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_a_clear_loss_fails_with_code_1(bench, capfd):
    code, verdict, _ = gated(bench, capfd, "kl_nats at_most 0.000001 nats", out="loss")
    assert (code, outcomes(verdict)) == (1, {"kl_nats": "fail"})
    assert "over 0.000001 with 95 % confidence whenever one stops" in verdict["variants"][0]["rules"][0]["why"]


def test_an_unclear_case_uses_all_questions_and_no_window_beyond_what_its_rules_take(bench, capfd):
    code, probe, _ = gated(bench, capfd, "mmlu_flips at_most 99 %", out="probe")
    value = probe["variants"][0]["rules"][0]["value"]
    code, verdict, folder = gated(
        bench, capfd, f"kl_nats at_most 5 nats, mmlu_flips at_most {100 * value:.1f} %", out="x"
    )
    assert (code, verdict["outcome"]) == (4, "inconclusive")
    assert outcomes(verdict) == {"kl_nats": "pass", "mmlu_flips": "inconclusive"}
    record = PairedRun(folder).record
    assert (record.tasks[0].items, record.tasks[0].subjects) == (QUESTIONS, ["astronomy", "philosophy"])
    assert record.protocol.windows < WINDOWS
    finished = judge(
        folder, Policy.model_validate({"name": "p", "rules": [{"metric": "mmlu_flips", "at_most": "99 %"}]})
    )
    assert finished.variants[0].rules[0].n == QUESTIONS


def test_a_variant_that_fails_is_broken(bench, capfd, monkeypatch):
    def fail(*_, **__):
        raise QevalError("no luck")

    monkeypatch.setattr("qeval.compare.variants.quantize_plan", fail)
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "another-home"))
    code, verdict, _ = gated(bench, capfd, "kl_nats at_most 5 nats", out="failed")
    assert code == 3
    assert "'rtn:g32' failed in this run: no luck" in verdict["variants"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("RUN --model m", "--model makes a run"),
        ("--model m", "Name the folder of a finished run, or a --model and a --method"),
        ("--model m --method rtn --variant rtn", "--variant picks from a finished run"),
    ],
)
def test_a_run_and_a_model_are_not_asked_for_together(bench, capfd, arguments, said):
    assert run_program(["gate", "--policy", "p.yaml", *arguments.split()]) == 2
    assert said in capfd.readouterr().err


def test_a_policy_that_needs_no_rows_needs_no_run(bench, capfd):
    code, said, _ = gated(bench, capfd, "size_ratio at_least 2 times", out="size")
    assert code == 2
    assert "needs a run" in said


def test_too_few_windows_are_refused_before_any_work(bench, capfd):
    code, said, folder = gated(bench, capfd, "kl_nats at_most 5 nats", "--max-windows", "24", out="short")
    assert code == 2
    assert "fewer than 25 windows, and there are 24" in said
    assert not folder.exists()


def pool(bench, seed=0):
    flags = CorpusChoice(str(bench.corpus), None, 64, 64, WINDOWS)
    settings = Settings(
        model=ModelChoice(str(bench.model)), recipes=(parse_method("rtn:g32", Defaults(None, "measured", False)),),
        variants=(), tasks=("kl", "mmlu"), corpus=flags, questions=TaskChoice(bench.mmlu, (), None, 2),
        calibration=CalibrationChoice(), out=bench.folder / "pool", threads=1, seed=seed,
    )  # fmt: skip
    return Pool(make_plan(settings))


def test_what_is_drawn_is_random_fixed_and_nested(bench):
    one, again, other = pool(bench), pool(bench), pool(bench, seed=1)
    first = one.draw(DrawnPart({}, 0), 0.1, {"kl", "mmlu"})
    assert first == DrawnPart({"mmlu": (12,)}, 6)
    assert one.drawn(first) == again.drawn(first) != other.drawn(first)
    assert len({subject for subject, _ in one.drawn(first).questions["mmlu"]}) == 2
    more = one.draw(first, 0.5, {"mmlu"})
    assert more == DrawnPart({"mmlu": (12, 60)}, 6)  # token rules are decided: no further window
    assert one.drawn(more).questions["mmlu"][:12] == one.drawn(first).questions["mmlu"]
    plan = one.plan_of(more)
    assert [suite.info.items for suite in plan.suites] == [12, 48]
    assert (plan.tasks[0].items, plan.protocol.windows) == (60, 6)
    assert plan.suites[0].parts() == one.plan_of(first).suites[0].parts()
    assert set(one.drawn(one.draw(more, 1.0, {"mmlu"})).questions["mmlu"]) == {
        (question.subject, question.item) for question in one.plan.suites[0].questions
    }


RULES = {
    "kl_nats": "0.02 nats", "kl_nats_p99": "0.05 nats", "ppl_increase": "1 %", "nll_diff_nats": "0.03 nats",
    "mmlu_flips": "6 %", "mmlu_acc_drop": "3 points", "mmlu_right_to_wrong": "5 %", "mmlu_choice_kl_nats": "0.3 nats",
}  # fmt: skip


def test_every_rule_is_decided_from_its_rows_in_the_order_drawn(tmp_path):
    """Against the tests called on arrays that are put in order by hand."""
    made = Made("awq", "awq", "int4-g128", "block 128", 4.13, 0.01)
    folder = make_run(tmp_path / "run", Shape(variants=(made,), windows=80, skill=3.0, questions=60))
    paired, rng = PairedRun(folder), np.random.default_rng(3)
    windows = rng.permutation(80)
    variant, task = paired.done[0], paired.record.tasks[0]
    rows, base = paired.tokens(variant), paired.baseline_tokens
    items, answers = paired.items(task, variant), paired.baseline_items(task)
    order = rng.permutation(len(items.items))
    keys = tuple((str(items.subjects[i]), int(items.items[i])) for i in order)
    drawn = Drawn(tuple(map(int, windows)), 400, {"mmlu": keys}, {"mmlu": 2000})
    rules = [{"metric": name, "at_most": margin} for name, margin in RULES.items()]
    policy = Policy.model_validate({"name": "p", "rules": [*rules, {"metric": "top1_agreement", "at_least": "90 %"}]})
    found = {rule.metric: rule.outcome for rule in look(paired, variant, policy, drawn)}

    kl = rows.of("kl_nats").reshape(80, -1)[windows]
    nll = (rows.of("nll") - base.of("nll")).reshape(80, -1)[windows]
    agree = rows.of("top1_agreement").reshape(80, -1)[windows]
    was, now = (answers.pred == answers.gold)[order], (items.pred == items.gold)[order]
    size = kl.shape[1]
    expected = {
        "kl_nats": decide_sums((kl - 0.02).sum(axis=1), 0.05, 400),
        "kl_nats_p99": decide_sums(((kl > 0.05) - 0.01).sum(axis=1), 0.05, 400, least_variance=0.0099 * size),
        "ppl_increase": decide_sums((nll - np.log(1.01)).sum(axis=1), 0.05, 400),
        "nll_diff_nats": decide_sums((nll - 0.03).sum(axis=1), 0.05, 400),
        "top1_agreement": decide_sums((agree - 0.9).sum(axis=1), 0.05, 400, least_variance=0.09 * size),
        "mmlu_flips": decide_bounded((was != now).astype(float), 0.06, 0.05),
        "mmlu_acc_drop": decide_bounded(was.astype(float) - now, 0.03, 0.05, low=-1),
        "mmlu_right_to_wrong": decide_bounded((was & ~now).astype(float), 0.05, 0.05),
    }
    for name, decision in expected.items():
        side = "above" if name == "top1_agreement" else "below"
        assert found[name] == (("pass" if decision.side == side else "fail") if decision else "inconclusive"), name
    assert {"pass", "fail"} <= set(found.values())
    assert found["mmlu_choice_kl_nats"] == "pass"


def test_a_baseline_at_chance_leaves_its_accuracy_open(tmp_path):
    made = Made("awq", "awq", "int4-g128", "block 128", 4.13, 0.0001)
    paired = PairedRun(make_run(tmp_path / "run", Shape(variants=(made,), windows=30, skill=0.0, questions=200)))
    items = paired.baseline_items(paired.record.tasks[0])
    keys = tuple((str(s), int(i)) for s, i in zip(items.subjects, items.items, strict=True))
    rule = {"metric": "mmlu_acc_drop", "at_most": "20 points", "when_at_chance": "pass"}
    policy = Policy.model_validate({"name": "p", "rules": [rule]})
    drawn = Drawn((), 0, {"mmlu": keys}, {"mmlu": len(keys)})
    (found,) = look(paired, paired.done[0], policy, drawn)
    assert (found.outcome, found.counts_as) == ("inconclusive", "pass")
    assert "includes chance" in found.why


def test_rows_that_are_not_finite_are_broken(tmp_path):
    def edit(name, columns):
        return columns if name == "baseline" else columns | {"kl_nats": [float("nan"), *columns["kl_nats"][1:]]}

    made = Made("awq", "awq", "int4-g128", "block 128", 4.13, 0.01)
    paired = PairedRun(make_run(tmp_path / "run", Shape(variants=(made,), edits={"tokens": edit})))
    policy = Policy.model_validate({"name": "p", "rules": [{"metric": "kl_nats", "at_most": "1 nats"}]})
    (found,) = look(paired, paired.done[0], policy, Drawn(tuple(range(16)), 16, {}, {}))
    assert found.outcome == "broken"
    assert "not finite" in found.why


def test_the_tasks_are_those_that_the_rules_need():
    rules = [{"metric": name, "at_most": margin} for name, margin in RULES.items()]
    policy = Policy.model_validate({"name": "p", "rules": [*rules, {"metric": "arc_easy_flips", "at_most": "1 %"}]})
    assert tasks_of(policy, "awq") == ("kl", "ppl", "mmlu", "arc_easy")
