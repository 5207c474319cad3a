"""`qeval diff` against slow definitions, and the runs that it refuses to pair."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qeval.cli.app import run_program as program
from qeval.errors import BrokenRecordError, UsageError
from qeval.report.diff import build_diff, diff_json
from qeval.report.diff.measure import judged
from qeval.report.diff.model import Difference
from qeval.report.model import Metric
from qeval.stats.flips import holm
from qeval.store.rows import RowStore
from tests.fixtures.runs import SEVEN, Made, Shape, make_run, reseal

A = Shape(variants=SEVEN[2:4], windows=12, length=32)
NEAR = Made("rtn", "rtn", "int4-g32", "block 32", 4.5, 0.02)
B = replace(A, variants=(SEVEN[2], NEAR))
"""The same `awq`, and an `rtn` that lies ten times nearer the baseline."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "a", A), make_run(folder / "b", B)


@pytest.fixture(scope="module")
def found(runs):
    return build_diff(*runs)


def edited(run, change):
    record = json.loads((run / "run.json").read_text())
    change(record)
    reseal(run, record)
    return run


def column(run, kind, variant, name):
    rows = [row for row in RowStore(run).read(kind).to_pylist() if row["variant"] == variant]
    return np.array([row[name] for row in rows if row[name] is not None], dtype=float)


def by_name(variant):
    return {one.name: one for one in variant.differences}


def test_differences_are_paired_and_clustered(runs, found):
    rtn = by_name(found.variants[1])
    pairs = {"kl_nats": "tokens", "nll": "tokens", "top1_agreement": "tokens", "acc": "items"}
    for name, kind in pairs.items():
        one = rtn["mmlu_acc" if name == "acc" else name]
        a, b = (column(run, kind, "rtn", name) for run in runs)
        assert (one.a, one.b) == pytest.approx((a.mean(), b.mean()))
        assert one.difference.value == pytest.approx((b - a).mean())
        assert one.difference.n == len(a)
        assert one.difference.clusters == 12
    means = column(runs[1], "tokens", "rtn", "kl_nats") - column(runs[0], "tokens", "rtn", "kl_nats")
    means = means.reshape(12, 32).mean(axis=1)  # windows of one size: the t test of their means is exact
    test = stats.ttest_1samp(means, 0)
    ends = test.confidence_interval(0.95)
    kl = rtn["kl_nats"]
    assert (kl.difference.low, kl.difference.high) == pytest.approx((ends.low, ends.high))
    assert kl.p_value == pytest.approx(test.pvalue)
    figures = [one for variant in found.variants for one in variant.differences]
    assert [one.p_adjusted for one in figures] == pytest.approx(holm([one.p_value for one in figures]))
    assert kl.verdict == "better"


def test_answers_are_those_of_b_against_a(runs, found):
    a, b = ((column(run, "items", "rtn", "pred"), column(run, "items", "rtn", "gold")) for run in runs)
    was, now = a[0] == a[1], b[0] == b[1]
    answers = found.variants[1].answers[0]
    assert (answers.right_to_wrong, answers.wrong_to_right) == ((was & ~now).sum(), (~was & now).sum())
    assert answers.wrong_to_other == (~was & ~now & (a[0] != b[0])).sum()
    flips = answers.right_to_wrong + answers.wrong_to_right
    assert answers.p_value == pytest.approx(stats.binomtest(answers.right_to_wrong, flips).pvalue)
    assert [v.answers[0].p_adjusted for v in found.variants] == pytest.approx(
        holm([v.answers[0].p_value for v in found.variants])
    )


def test_a_variant_that_is_the_same_is_said_to_be(found):
    assert {one.verdict for one in found.variants[0].differences} == {"the same"}
    assert found.variants[0].answers[0].p_value == 1.0


def test_what_is_not_the_same_is_listed(found):
    changed = {one.what: (one.a, one.b) for one in found.changed}
    assert changed["rtn: grid"] == ("int4-g128", "int4-g32")
    assert "rtn: size_bytes" in changed
    assert not any(what.startswith("awq") or what == "torch" for what in changed)


def test_words_json_and_tables(runs, found, capfd):
    assert program(["diff", *map(str, runs), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads(diff_json(found))
    assert program(["diff", *map(str, runs)]) == 0
    text = " ".join(capfd.readouterr().out.split())
    for part in ("awq: no row differs.", "rtn: in B KL from the baseline is lower by", "(better)", "after Holm over"):
        assert part in text
    assert "log-likelihoods are the same within 0 nats" in text
    assert "Neither run measured the noise floor" in text


def test_variants_of_other_names_are_paired_when_told(runs):
    (pair,) = build_diff(runs[0], runs[0], [("rtn", "awq")]).variants
    assert (pair.a, pair.b) == ("rtn", "awq")
    assert by_name(pair)["kl_nats"].difference.value < 0


def one_difference(value, better="lower", floor=None):
    metric = Metric(value=value, low=None, high=None, unit="nats", better=better, n=9, clusters=9)
    return Difference(
        name="x", title="x", a=0, b=value, difference=metric, floor=floor, p_value=0.0, p_adjusted=0.0,
        verdict="not resolved",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "p", "said"),
    [
        (one_difference(-0.1), 0.01, "better"),
        (one_difference(0.1), 0.01, "worse"),
        (one_difference(0.1, "higher"), 0.01, "better"),
        (one_difference(-0.1, "higher"), 0.01, "worse"),
        (one_difference(-0.1), 0.06, "not resolved"),
        (one_difference(-0.1), None, "not resolved"),
        (one_difference(-0.1, floor=0.2), 0.0, "inconclusive"),
        (one_difference(0.1, floor=0.1), 0.0, "inconclusive"),
        (one_difference(-0.3, floor=0.2), 0.01, "better"),
    ],
)
def test_the_verdict_knows_the_direction_and_the_floor(one, p, said):
    assert judged(one, p).verdict == said


def test_an_effect_under_the_noise_floor_is_inconclusive_never_better(tmp_path):
    floor = Made("fp16", "none", "", "", 16, 0.9)
    shapes = {"a": replace(A, variants=(*A.variants, floor)), "b": replace(B, variants=(*B.variants, floor))}
    runs = [
        edited(make_run(tmp_path / name, shape), lambda r: r["variants"][2].update(role="floor"))
        for name, shape in shapes.items()
    ]
    found = build_diff(*runs)
    assert [variant.a for variant in found.variants] == ["awq", "rtn"]  # the floor itself is never compared
    kl = by_name(found.variants[1])["kl_nats"]
    assert kl.p_adjusted < 0.05
    assert kl.floor == pytest.approx(column(runs[0], "tokens", "fp16", "kl_nats").mean())
    assert kl.verdict == "inconclusive"
    assert not any("Neither run measured" in note for note in found.notes)


def test_a_baseline_at_chance_is_said_to_be(tmp_path, capfd):
    runs = [str(make_run(tmp_path / name, replace(shape, skill=0.0))) for name, shape in (("a", A), ("b", B))]
    assert program(["diff", *runs]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert "cannot be told from guessing" in text
    assert "baseline at chance" in text


def shifted(name, amount):
    def edit(variant, columns):
        if variant != "baseline":
            return columns
        if name == "choice_loglikelihoods":
            return columns | {name: [[value + amount for value in row] for row in columns[name]]}
        return columns | {name: [None if value is None else value + amount for value in columns[name]]}

    return edit


def test_baselines_within_rounding_are_one_and_their_distance_is_told(tmp_path, runs):
    other = make_run(tmp_path, replace(B, edits={"tokens": shifted("nll", 2e-5)}))
    assert "same within 2e-05 nats" in build_diff(runs[0], other).notes[0]


REFUSED = {
    "other weights": (B, lambda r: r["model"].update(weights_sha256="b" * 64), "The baselines differ:", "one model"),
    "a baseline of another precision": (
        replace(B, edits={"tokens": shifted("nll", 0.01)}), None,
        "The baselines differ: 372 of 384 log-likelihoods of tokens are more than 0.001 nats apart", "by up to 0.01 ",
    ),
    "a baseline with other answers": (
        replace(B, edits={"items": shifted("choice_loglikelihoods", 0.01)}), None, "960 of 960 log-likelihoods of mmlu",
        "FP16 weights computed in fp32 on torch",
    ),
    "fewer windows": (
        replace(B, windows=10), None, "not scored on the same tokens", "384 and 320 rows in 12 and 10 windows",
    ),
    "other tokens": (
        replace(B, edits={"tokens": lambda _, c: c | {"token": [7, 8, *list(c["token"])[2:]]}}), None,
        "2 of 384 tokens of ", "differ",
    ),
    "fewer questions": (
        replace(B, questions=19), None, "were not asked the same mmlu", "240 questions and", "228",
    ),
    "other prompts": (
        replace(B, edits={"items": lambda _, c: c | {"prompt_sha256": ["0" * 64, *c["prompt_sha256"][1:]]}}), None,
        "1 prompts differ, the first at question 0 of 'abstract_algebra'",
    ),
    "no variant of one name": (
        replace(B, variants=SEVEN[:1]), None, "have no scored variant of one name", "--variant NAME_IN_A=NAME_IN_B",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "change", "said"), [(s, c, w) for s, c, *w in REFUSED.values()], ids=REFUSED)
def test_runs_that_do_not_pair_are_refused_with_what_differs(tmp_path, runs, capfd, shape, change, said):
    other = make_run(tmp_path, shape)
    if change:
        edited(other, change)
    assert program(["diff", str(runs[0]), str(other)]) == 2
    heard = capfd.readouterr()
    assert heard.out == ""
    assert heard.err.count("\n") == 1
    for words in said:
        assert words in heard.err


def test_what_one_run_lacks_is_named(tmp_path, runs):
    tokens_alone = make_run(tmp_path / "t", replace(B, metrics=("kl",)))
    found = build_diff(runs[0], tokens_alone)
    assert [one.name for one in found.variants[0].differences] == ["kl_nats", "top1_agreement"]
    assert f"Not compared, of '{runs[0]}': mmlu." in found.notes
    more = make_run(tmp_path / "m", replace(B, variants=(*B.variants, SEVEN[0])))
    assert f"Not compared, of '{more}': mixed." in build_diff(runs[0], more).notes


def test_runs_without_a_common_metric_or_without_any_are_an_error(tmp_path, runs):
    asked = make_run(tmp_path / "a", replace(B, metrics=("mmlu",)))
    told = make_run(tmp_path / "b", replace(B, metrics=("kl",)))
    with pytest.raises(BrokenRecordError, match=r"no metric in common \(mmlu and kl\)"):
        build_diff(asked, told)
    empty = make_run(tmp_path / "c", replace(B, metrics=()))
    with pytest.raises(BrokenRecordError, match="no metric in common"):
        build_diff(runs[0], empty)


def test_bad_input_is_told_apart(tmp_path, runs, capfd):
    def refused(code, *arguments):
        assert program(["diff", *map(str, arguments)]) == code
        heard = capfd.readouterr().err
        assert heard.count("\n") == 1
        return heard

    assert "holds no run" in refused(2, runs[0], tmp_path)
    assert "'awk'; nearest: awq" in refused(2, *runs, "--variant", "awk")
    assert "'rtm'; nearest: rtn" in refused(2, *runs, "--variant", "awq=rtm")
    other = edited(make_run(tmp_path / "v", B), lambda record: record.update(run_version=3))
    assert "of another version" in refused(3, runs[0], other)
    broken = make_run(tmp_path / "n", replace(B, edits={"tokens": nan_in_awq}))
    assert "'awq' has 1 of 384 kl_nats that are not finite" in refused(3, runs[0], broken)
    short = make_run(tmp_path / "s", replace(B, edits={"items": short_rtn}))
    assert "'rtn' has 237 answers of 'mmlu' and the run asked 240 questions" in refused(3, runs[0], short)
    failed = edited(make_run(tmp_path / "f", B), lambda r: r["variants"][1].update(status="failed", error="No memory."))
    assert "'rtn' failed in this run and has no rows: No memory." in refused(3, runs[0], failed, "--variant", "rtn")


def nan_in_awq(variant, columns):
    return columns | {"kl_nats": [float("nan"), *columns["kl_nats"][1:]]} if variant == "awq" else columns


def short_rtn(variant, columns):
    return {key: list(column)[3:] for key, column in columns.items()} if variant == "rtn" else columns


def test_a_diff_needs_no_torch(runs):
    code = (
        "import sys; from qeval.cli.app import run_program; code = run_program(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "diff", *map(str, runs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_variant_is_a_usage_error(runs):
    with pytest.raises(UsageError):
        build_diff(*runs, [("rtn", "none")])
