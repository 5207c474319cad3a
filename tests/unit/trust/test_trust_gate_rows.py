"""What is defended: rows that repeat, a baseline that is no model, and a variant that is none pass for nothing else.

Each is a run made by formula, chained as a run that ended so, whose rows alone are at fault.
"""

import json

import numpy as np
import pytest

from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.report import build_report
from qeval.report.diff import build_diff
from qeval.report.independent import GRAM, is_first_text, question_clusters, window_clusters
from qeval.report.measure_items import choice_kl_nats
from qeval.report.run_rows import PairedRun
from qeval.report.soundness import impossible_baseline, not_quantized
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters
from qeval.store.run import ProtocolRecord
from qeval.tasks.drift import prompts_of
from tests.fixtures.gate import INT4, INT8, told
from tests.fixtures.runs import Shape, make_run, reseal

QUESTIONS = 200
ONE = ("astronomy",)


def policy(*rules, **more):
    return Policy.model_validate({"name": "p", "rules": list(rules), **more})


def at_most(metric, margin):
    return {"metric": metric, "at_most": margin}


def at_least(metric, margin):
    return {"metric": metric, "at_least": margin}


def outcome(folder, *rules, **more):
    return judge(folder, policy(*rules, **more)).variants[0]


def asked(*prompts):
    """An edit that gives questions these prompts, over and over, and the answers of the first of each."""

    def edit(_, columns):
        count = len(columns["item"])
        place = np.arange(count) % len(prompts)
        first = {"choice_loglikelihoods", "pred", "gold", "acc"}
        same = {name: [columns[name][i] for i in place] for name in first}
        return columns | same | {"prompt_sha256": [prompts[i] for i in place]}

    return {"items": edit}


def questions(tmp_path, *prompts, subjects=ONE, number=QUESTIONS):
    shape = Shape(variants=(INT8,), subjects=subjects, questions=number, metrics=("mmlu",), edits=asked(*prompts))
    return make_run(tmp_path / "run", shape)


def test_one_question_many_times_is_one_observation(tmp_path):
    verdict = judge(questions(tmp_path, "a" * 64), policy(at_most("mmlu_flips", "1 %")))
    (rule,) = verdict.variants[0].rules
    assert (rule.outcome, rule.n, rule.clusters) == ("inconclusive", 1, 1)
    assert "no bound from a single one of the questions" in rule.why
    assert "199 of 200 questions have the same token ids as another" in " ".join(verdict.notes)


def test_two_questions_many_times_bound_what_two_can(tmp_path):
    (rule,) = outcome(questions(tmp_path, "a" * 64, "b" * 64), at_most("mmlu_flips", "4 %")).rules
    assert (rule.outcome, rule.n, rule.clusters) == ("inconclusive", 2, 2)
    assert rule.high > 0.5


def test_one_question_in_every_subject_is_one_observation(tmp_path):
    folder = questions(tmp_path, "a" * 64, subjects=("anatomy", "astronomy", "marketing"), number=50)
    (rule,) = outcome(folder, at_most("mmlu_acc_drop", "5 points")).rules
    assert (rule.outcome, rule.clusters) == ("inconclusive", 1)


def test_questions_asked_twice_are_counted_once(tmp_path):
    folder = questions(tmp_path, *[f"{i:064d}" for i in range(QUESTIONS // 2)])
    (rule,) = outcome(folder, at_most("mmlu_choice_kl_nats", "5 nats")).rules
    assert (rule.n, rule.clusters) == (QUESTIONS // 2, QUESTIONS // 2)
    shown = build_report(folder).variants[0].metrics["mmlu_choice_kl_nats"]
    assert (shown.n, shown.clusters) == (QUESTIONS, QUESTIONS // 2)
    run = PairedRun(folder)
    rows, base = run.items(run.record.tasks[0], run.done[0]), run.baseline_items(run.record.tasks[0])
    each = Clusters.single_rows(QUESTIONS)
    believed = estimates.mean(choice_kl_nats(rows, base), each, unit="nats", better="lower", seed=0)
    assert (shown.high - shown.low) / (believed.high - believed.low) == pytest.approx(2**0.5, rel=0.1)


def test_a_test_of_flips_counts_each_question_once(tmp_path):
    def edit(name, columns):
        right = columns["gold"] if name == "baseline" else (np.asarray(columns["gold"]) + 1) % 4
        columns = columns | {"pred": right, "prompt_sha256": ["a" * 64] * len(columns["item"])}
        return columns | {"acc": (np.asarray(right) == columns["gold"]).astype(float)}

    shape = Shape(variants=(INT8,), subjects=ONE, metrics=("mmlu",), edits={"items": edit})
    result = build_report(make_run(tmp_path / "run", shape)).variants[0].tasks["mmlu"]
    assert result.flips.right_to_wrong == 20
    assert result.flips_p == 1.0


def test_question_ids_that_repeat_are_broken(tmp_path):
    def edit(_, columns):
        return columns | {"item": np.zeros(len(columns["item"]), int)}

    shape = Shape(variants=(INT8,), subjects=ONE, metrics=("mmlu",), edits={"items": edit})
    assert outcome(make_run(tmp_path / "run", shape), at_most("mmlu_flips", "90 %")).outcome == "broken"


def repeated(windows, length, copies=2, shift=0):
    """An edit that makes of a text so many copies, one behind the other, moved by `shift` tokens."""

    def edit(_, columns):
        size = windows * length // copies
        place = (np.arange(windows * length) + shift * (np.arange(windows * length) >= size)) % size
        return columns | {"token": np.asarray(columns["token"])[place]}

    return {"tokens": edit}


def tokens(tmp_path, windows=16, length=64, record=None, **edits):
    shape = Shape(
        variants=(INT8,), windows=windows, length=length, metrics=("kl", "ppl"), edits=edits, texts=False,
        record=record or {},
    )  # fmt: skip
    return make_run(tmp_path / "run", shape)


def test_one_window_twice_is_one_observation(tmp_path):
    verdict = judge(tokens(tmp_path, windows=2, **repeated(2, 64)), policy(at_most("kl_nats", "5 nats")))
    (rule,) = verdict.variants[0].rules
    assert (rule.outcome, rule.clusters) == ("inconclusive", 1)
    assert "1 of 2 windows or stretches of text hold tokens that stand in another one" in " ".join(verdict.notes)


@pytest.mark.parametrize("shift", [0, 5])
def test_a_text_that_stands_there_twice_is_counted_once(tmp_path, shift):
    (rule,) = outcome(tokens(tmp_path, **repeated(16, 64, shift=shift)), at_most("kl_nats", "5 nats")).rules
    assert rule.clusters == 8
    assert rule.n == 8 * 64


def test_a_text_under_two_names_is_counted_once(tmp_path):
    part = {"corpus_sha256": "c" * 64, "tokens_sha256": "d" * 64, "windows": 8, "windows_available": 8}
    folder = tokens(tmp_path, **repeated(16, 64))
    content = json.loads((folder / "run.json").read_text())
    content["protocol"]["parts"] = [{"corpus": name, "first": 8 * i, **part} for i, name in enumerate("ab")]
    reseal(folder, content)
    assert outcome(folder, at_most("kl_nats", "5 nats")).rules[0].clusters == 8
    assert build_report(folder).variants[0].metrics["kl_nats"].clusters == 8


def test_full_agreement_on_repeated_text_bounds_what_the_distinct_text_can(tmp_path):
    def edit(name, columns):
        columns = repeated(16, 64, copies=16)["tokens"](name, columns)
        return columns if name == "baseline" else columns | {"top1_agreement": [True] * len(columns["window"])}

    (rule,) = outcome(tokens(tmp_path, tokens=edit), at_least("top1_agreement", "99.9 %")).rules
    assert rule.outcome == "inconclusive"
    assert rule.n == 64


def protocol(window, stride, parts=()):
    fields = dict.fromkeys(("name", "corpus", "corpus_sha256", "tokens_sha256"), "x")
    counts = dict.fromkeys(("windows", "windows_available", "kl_positions", "nll_positions"), 1)
    parts = [
        {"corpus": str(first), "corpus_sha256": "x", "tokens_sha256": "x", "windows": 1, "windows_available": 1,
         "first": first}
        for first in parts
    ]  # fmt: skip
    return ProtocolRecord(**fields, **counts, window=window, stride=stride, bos=False, parts=parts)


def cut(text, window, stride):
    """The window and the token of each row of a text cut with a stride."""
    rows = [(0, token) for token in text[:window]]
    starts = range(window, len(text), stride)
    rows += [(n, token) for n, start in enumerate(starts, 1) for token in text[start : start + stride]]
    windows, ids = zip(*rows, strict=True)
    return np.array(windows), np.array(ids)


@pytest.mark.parametrize("stride", [1, 16, 32, 64])
def test_windows_that_overlap_make_clusters_of_a_windows_length(stride):
    text = np.random.default_rng(0).integers(0, 50_000, 64 * 20)
    windows, ids = cut(text, 64, stride)
    found = window_clusters(windows, ids, protocol(64, stride))
    sizes = np.unique(found, return_counts=True)[1]
    assert sizes.tolist() == [64] * 20
    assert is_first_text(windows, found, protocol(64, stride)).all()


def test_each_text_of_several_starts_clusters_of_its_own():
    rng = np.random.default_rng(1)
    windows = np.concatenate([np.repeat([0, 1, 2], [8, 4, 4]), np.repeat([3, 4, 5], [8, 4, 4])])
    found = window_clusters(windows, rng.integers(0, 50_000, len(windows)), protocol(8, 4, parts=(0, 3)))
    assert np.unique(found).tolist() == [0, 1, 3, 4]


def test_short_windows_are_one_only_where_they_are_equal():
    windows = np.repeat(np.arange(4), 8)
    ids = np.concatenate([np.arange(8), np.arange(8), np.arange(8) + 1, [7] * 8])
    assert window_clusters(windows, ids, protocol(8, 8)).tolist() == np.repeat([0, 0, 2, 3], 8).tolist()


def test_a_short_tail_makes_no_other_window_a_repeat():
    rng = np.random.default_rng(2)
    windows = np.concatenate([np.repeat(np.arange(10), 2 * GRAM), [10, 10]])
    ids = np.concatenate([rng.integers(0, 30, 20 * GRAM), [1, 2]])
    assert len(np.unique(window_clusters(windows, ids, protocol(2 * GRAM, 2 * GRAM)))) == 11


def test_texts_that_share_a_phrase_stay_apart():
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 50_000, (20, 128))
    ids[:, :50] = ids[0, :50]  # a licence's header
    windows = np.repeat(np.arange(20), 128)
    assert len(np.unique(window_clusters(windows, ids.ravel(), protocol(128, 128)))) == 20


def test_bounds_with_a_stride_of_one_are_no_narrower(tmp_path):
    length, count = 16, 40
    plain = tokens(tmp_path / "plain", windows=count, length=length)

    def strided(_, columns):
        total = count * length
        windows = np.concatenate([np.zeros(length, int), np.arange(1, total - length + 1)])
        return columns | {"window": windows, "position": np.where(windows == 0, np.arange(total), length - 1)}

    record = dict(json.loads((plain / "run.json").read_text())["protocol"], stride=1, windows=count * length - 15)
    folder = tokens(tmp_path / "strided", windows=count, length=length, record={"protocol": record}, tokens=strided)
    rules = [outcome(each, at_most("kl_nats", "5 nats")).rules[0] for each in (plain, folder)]
    assert [rule.clusters for rule in rules] == [count, count]
    assert rules[1].high - rules[1].low == pytest.approx(rules[0].high - rules[0].low)
    note = " ".join(judge(folder, policy(at_most("kl_nats", "5 nats"))).notes)
    assert "The 625 windows overlap (16 tokens, stride 1)" in note
    assert note.split("count ")[1].startswith("40 stretches of text")
    assert any("overlap" in each for each in build_report(folder).notes)


def test_subjects_that_share_a_question_are_one_cluster_and_others_stay():
    subjects = np.array(["a", "a", "b", "b", "c", "c"], object)
    prompts = np.array(["1", "2", "2", "3", "4", "5"], object)
    assert question_clusters(subjects, prompts).ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert question_clusters(subjects[:2], prompts[:2]).count == 2


def constant(value, column="entropy_nats"):
    def edit(name, columns):
        if name != "baseline":
            return columns
        return columns | {column: [None if old is None else value for old in columns[column]]}

    return {"tokens": edit}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (constant(float("nan"), "nll"), "Values that are not finite: ppl (1008 of 1008)"),
        (constant(float("inf"), "entropy_nats"), "Values that are not finite: entropy_nats (1024 of 1024)"),
        (constant(0.0), "certain of one token at each of 1,024 positions"),
        (constant(np.log(49152)), "gives every token the same probability at each of 1,024 positions"),
        (constant(2.5), "gives the same distribution at each of 1,024 positions"),
    ],
)
def test_a_baseline_that_is_no_model_is_broken_whatever_is_asked(tmp_path, capfd, edit, said):
    folder = tokens(tmp_path, **edit)
    easy = [at_least("top1_agreement", "1 %"), at_least("size_ratio", "1 times"), at_most("kl_nats", "99 nats")]
    verdict = judge(folder, policy(*easy))
    assert (verdict.outcome, verdict.exit_code) == ("broken", 3)
    assert said in verdict.variants[0].error
    with pytest.raises(Exception, match="Nothing can be compared with this baseline"):
        build_report(folder)
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"name": "p", "rules": easy}))
    assert told(capfd, folder, "--policy", path)[0] == 3


def test_a_baseline_that_answers_the_same_whatever_it_is_asked_is_broken(tmp_path):
    def edit(name, columns):
        same = [[-1.0, -2.0, -3.0, -4.0]] * len(columns["item"])
        return columns | {"choice_loglikelihoods": same, "pred": np.zeros(len(same), int)}

    shape = Shape(variants=(INT8,), metrics=("mmlu",), edits={"items": edit})
    verdict = outcome(make_run(tmp_path / "run", shape), at_most("mmlu_flips", "90 %"))
    assert verdict.outcome == "broken"
    assert "same log-likelihoods to the choices of all 240 distinct questions" in verdict.error


def test_a_baseline_that_goes_on_the_same_whatever_it_is_asked_is_broken(tmp_path):
    def edit(_, columns):
        same = np.tile(np.arange(64), 32)
        return columns | {"token": same, "pred": same}

    shape = Shape(variants=(INT8,), metrics=("drift",), edits={"drift": edit})
    verdict = outcome(make_run(tmp_path / "run", shape), at_least("drift_equal", "1 %"))
    assert "continues all 32 prompts with the same tokens" in verdict.error


def test_a_near_uniform_baseline_is_a_model(tmp_path):
    def edit(name, columns):
        entropy = np.log(49152) - np.abs(np.random.default_rng(0).normal(0, 1e-3, len(columns["window"])))
        return columns | {"entropy_nats": entropy} if name == "baseline" else columns

    assert impossible_baseline(PairedRun(tokens(tmp_path, tokens=edit))) is None


@pytest.mark.parametrize(
    "rule", [at_least("top1_agreement", "1 %"), at_most("ppl_increase", "999 %"), at_least("size_ratio", "1 times")]
)
def test_no_metric_is_taken_without_finite_kl_beside_it(tmp_path, rule):
    def edit(name, columns):
        return columns if name == "baseline" else columns | {"kl_nats": np.full(len(columns["window"]), np.nan)}

    (found,) = outcome(tokens(tmp_path, tokens=edit), rule).rules
    assert found.outcome == "broken"
    assert "1024 of 1024 values are not finite" in found.why


def floats(folder, **changes):
    content = json.loads((folder / "run.json").read_text())
    content["variants"][0].update(quantized_weights=0, quantized_parameters=0, grid="float", **changes)
    return reseal(folder, content)


def equal_to_the_baseline(_, columns):
    base = make_columns["baseline"]
    zeros = np.zeros(len(columns["window"]))
    compared = dict.fromkeys(("kl_nats", "reverse_kl_nats", "kl_abs_modelopt"), zeros)
    return columns | {"nll": base["nll"], **compared, "top1_agreement": [True] * len(zeros)}


make_columns = {}


def remember(name, columns):
    if name == "baseline":
        make_columns["baseline"] = columns
        return columns
    return equal_to_the_baseline(name, columns)


@pytest.mark.parametrize("way", ["nothing is quantized", "equal to the baseline"])
def test_a_variant_that_quantization_did_not_make_is_noted_everywhere_and_fails_where_required(tmp_path, way, capfd):
    folder = floats(tokens(tmp_path)) if way == "nothing is quantized" else tokens(tmp_path, tokens=remember)
    said = "Nothing in 'rtn:int8-channel' is quantized" if "nothing" in way else "answers exactly as the baseline does"
    easy = at_least("top1_agreement", "50 %")
    verdict = judge(folder, policy(easy))
    assert verdict.outcome == "pass"
    assert said in " ".join(verdict.notes)
    required = judge(folder, policy(easy, require="quantized"))
    assert (required.outcome, required.exit_code) == ("fail", 1)
    assert said in required.variants[0].error
    assert judge(folder, policy(easy, require=["any", "quantized"])).outcome == "fail"
    assert any(said in warning for warning in build_report(folder).warnings)
    assert any(said in note for note in build_diff(folder, folder).notes)

    junit, markdown, path = tmp_path / "j.xml", tmp_path / "m.md", tmp_path / "p.yaml"
    path.write_text(json.dumps({"name": "p", "require": "quantized", "rules": [easy]}))
    code, out, _ = told(capfd, folder, "--policy", path, "--junit", junit, "--markdown", markdown)
    assert code == 1
    for text in (out, junit.read_text().replace("&apos;", "'"), markdown.read_text()):
        assert said in " ".join(text.split())
    assert "<failure" in junit.read_text()


def test_a_quantized_variant_passes_where_quantized_is_required(tmp_path):
    folder = tokens(tmp_path)
    assert judge(folder, policy(at_most("kl_nats", "5 nats"), require="quantized")).outcome == "pass"
    run = PairedRun(folder)
    assert not_quantized(run, run.done[0]) is None


def test_rows_of_one_variant_under_the_name_of_another_are_noted(tmp_path):
    held = {}

    def edit(name, columns):
        if name == "baseline":
            return columns
        return columns | {key: held.setdefault(key, columns[key]) for key in columns if key != "variant"}

    shape = Shape(variants=(INT8, INT4), metrics=("kl", "ppl"), edits={"tokens": edit}, texts=False)
    verdict = judge(make_run(tmp_path / "run", shape), policy(at_most("kl_nats", "5 nats")))
    assert "'rtn:int8-channel' and 'rtn' give the same rows to the last bit" in " ".join(verdict.notes)


def test_prompts_that_repeat_are_continued_once():
    text = list(range(100)) * 4
    assert len(prompts_of(text, 8, 10, None)) == 2
    assert len(prompts_of(range(400), 8, 10, None)) == 8
