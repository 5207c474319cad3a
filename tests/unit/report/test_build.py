"""The Report of a synthetic run against slow definitions, and what it does with runs that are not sound."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.report import build_report, formatting, report_json
from qeval.report.build import mark_pareto
from qeval.report.model import Metric, report_schema_json
from qeval.report.tables import floor_remark, overview_table
from qeval.stats.flips import holm
from qeval.store.rows import RowStore
from tests.fixtures.runs import SEVEN, SUBJECTS, Shape, make_run, reseal

SMALL = Shape(variants=SEVEN[:3], windows=12, length=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), SMALL)


@pytest.fixture(scope="module")
def report(run):
    return build_report(run)


def rows_of(run, kind, variant):
    rows = [row for row in RowStore(run).read(kind).to_pylist() if row["variant"] == variant]
    return {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}


def softmax_of(row):
    exponentials = [np.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def values(columns, name):
    return np.array([value for value in columns[name] if value is not None], dtype=float)


def test_token_metrics_equal_their_definitions(run, report):
    mine, base = rows_of(run, "tokens", "awq"), rows_of(run, "tokens", "baseline")
    metrics = report.variants[2].metrics
    kl, nll, base_nll = values(mine, "kl_nats"), values(mine, "nll"), values(base, "nll")
    expected = {
        "kl_nats": kl.mean(),
        "kl_nats_p50": np.quantile(kl, 0.5, method="inverted_cdf"),
        "kl_nats_p99": np.quantile(kl, 0.99, method="inverted_cdf"),
        "kl_nats_max": kl.max(),
        "reverse_kl_nats": values(mine, "reverse_kl_nats").mean(),
        "kl_abs_modelopt": values(mine, "kl_abs_modelopt").mean(),
        "top1_agreement": values(mine, "top1_agreement").mean(),
        "ppl": np.exp(nll.mean()),
        "ppl_ratio": np.exp(nll.mean()) / np.exp(base_nll.mean()),
        "nll_diff_nats": (nll - base_nll).mean(),
        "delta_p": values(mine, "delta_p").mean(),
        "delta_p_rms": np.sqrt((values(mine, "delta_p") ** 2).mean()),
    }
    assert {name: metrics[name].value for name in expected} == pytest.approx(expected, rel=1e-12)
    assert report.baseline.metrics["ppl"].value == pytest.approx(np.exp(base_nll.mean()))
    assert (metrics["kl_nats"].n, metrics["kl_nats"].clusters) == (12 * 32, 12)
    assert metrics["ppl"].n == 12 * 31
    assert metrics["kl_nats"].low < metrics["kl_nats"].value < metrics["kl_nats"].high


def test_item_metrics_equal_their_definitions(run, report):
    mine, base = rows_of(run, "items", "awq"), rows_of(run, "items", "baseline")
    metrics, result = report.variants[2].metrics, report.variants[2].tasks["mmlu"]
    right, was_right = mine["pred"] == mine["gold"], base["pred"] == base["gold"]
    p = special.softmax(np.array(base["choice_loglikelihoods"].tolist()), axis=1)
    q = special.softmax(np.array(mine["choice_loglikelihoods"].tolist()), axis=1)
    assert metrics["mmlu_acc"].value == pytest.approx(right.mean())
    by_subject = [right[mine["subject"] == name].mean() for name in SUBJECTS]
    assert metrics["mmlu_acc_macro"].value == pytest.approx(np.mean(by_subject))
    assert metrics["mmlu_acc_diff"].value == pytest.approx(right.mean() - was_right.mean())
    assert metrics["mmlu_flips"].value == pytest.approx((right != was_right).mean())
    assert metrics["mmlu_right_to_wrong"].value == pytest.approx((was_right & ~right).mean())
    assert metrics["mmlu_choice_kl_nats"].value == pytest.approx(special.rel_entr(p, q).sum(axis=1).mean())
    other = ~was_right & ~right & (mine["pred"] != base["pred"])
    assert result.flips.wrong_to_other == other.sum()
    assert sum(dict(result.flips).values()) == SMALL.questions * len(SUBJECTS)
    stem = np.isin(mine["subject"].astype(str), [name for name, kind in SUBJECTS.items() if kind == "stem"])
    assert result.by_category["stem"].acc.value == pytest.approx(right[stem].mean())
    anatomy = mine["subject"] == "anatomy"
    assert result.by_subject["anatomy"].difference.value == pytest.approx(
        right[anatomy].mean() - was_right[anatomy].mean()
    )
    assert result.by_subject["anatomy"].acc.clusters == SMALL.questions  # one subject: its questions


def test_flips_are_tested_alone_and_over_all_variants(report):
    tests = {}
    for variant in report.variants:
        result = variant.tasks["mmlu"]
        lost, won = result.flips.right_to_wrong, result.flips.wrong_to_right
        tests[variant.name] = stats.binomtest(lost, lost + won).pvalue
        assert result.flips_p == pytest.approx(tests[variant.name])
    adjusted = [variant.tasks["mmlu"].flips_p_adjusted for variant in report.variants]
    assert adjusted == pytest.approx(holm(list(tests.values())))
    assert report.baseline.tasks["mmlu"].flips_p is None


def test_the_noise_floor_is_no_part_of_the_family_of_tests(tmp_path):
    run = make_run(tmp_path, SMALL)
    record = json.loads((run / "run.json").read_text())
    record["variants"][2]["role"] = "floor"
    reseal(run, record)
    found = [variant.tasks["mmlu"] for variant in build_report(run).variants]
    assert found[2].flips_p_adjusted is None
    assert [one.flips_p_adjusted for one in found[:2]] == pytest.approx(holm([one.flips_p for one in found[:2]]))


@pytest.mark.parametrize(("share", "beside"), [(1.1, True), (2.9, True), (3.1, False)])
def test_a_kl_under_three_times_the_floor_has_the_floor_beside_it(tmp_path, share, beside):
    run = make_run(tmp_path, SMALL)
    record = json.loads((run / "run.json").read_text())
    record["variants"][2]["role"] = "floor"
    reseal(run, record)
    report = build_report(run)
    floor, variant = report.variants[2], report.variants[0]
    value = variant.metrics["kl_nats"].value / share
    floor.metrics["kl_nats"] = floor.metrics["kl_nats"].model_copy(update={"value": value})
    assert (floor_remark(report, variant, "kl_nats") is not None) == beside
    assert floor_remark(report, floor, "kl_nats") is None
    shown = str(overview_table(report))
    assert (f"floor {formatting.metric_text(floor.metrics['kl_nats'])}" in shown) == beside


def test_macro_accuracy_differs_from_the_micro_one_where_subjects_are_unequal(tmp_path):
    def fewer(name, columns):
        keep = [i for i, s in enumerate(columns["subject"]) if s != "anatomy" or columns["item"][i] < 4]
        return {key: [list(column)[i] for i in keep] for key, column in columns.items()}

    shape = replace(SMALL, edits={"items": fewer})
    run = make_run(tmp_path, shape)
    record = json.loads((run / "run.json").read_text())
    record["tasks"][0]["items"] -= 16
    reseal(run, record)
    metrics = build_report(run).variants[0].metrics
    rows = rows_of(run, "items", "mixed")
    right = (rows["pred"] == rows["gold"]).astype(float)
    assert metrics["mmlu_acc"].value == pytest.approx(right.mean())
    assert metrics["mmlu_acc_macro"].value == pytest.approx(
        np.mean([right[rows["subject"] == name].mean() for name in SUBJECTS])
    )
    assert metrics["mmlu_acc"].value != pytest.approx(metrics["mmlu_acc_macro"].value, abs=1e-6)


def test_json_has_the_promised_keys_at_their_places(report):
    told = json.loads(report_json(report))
    assert {"schema_version", "model", "baseline", "variants", "provenance"} <= set(told)
    assert told["schema_version"] == 1
    variant = told["variants"][0]
    assert {"name", "method", "backend", "bits_per_weight", "size_bytes", "metrics"} <= set(variant)
    for name in ("kl_nats", "ppl", "top1_agreement", "mmlu_acc"):
        assert {"value", "low", "high", "unit", "better", "n"} <= set(variant["metrics"][name])
    assert {"ppl", "mmlu_acc"} <= set(told["baseline"]["metrics"])


def test_schema_file_is_what_the_module_says():
    from qeval.paths import shipped

    path = shipped("configs/report.schema.json")
    assert path.read_text(encoding="utf-8") == report_schema_json(), (
        "configs/report.schema.json is out of date: write it again with `python -m qeval.report.model`."
    )


def test_order_of_rows_does_not_matter(tmp_path, report):
    def shuffled(name, columns):
        order = np.random.default_rng(len(name)).permutation(len(columns["variant"]))
        return {key: [list(column)[i] for i in order] for key, column in columns.items()}

    run = make_run(tmp_path, replace(SMALL, edits={"tokens": shuffled, "items": shuffled}))
    assert build_report(run).variants == report.variants


def test_metrics_not_asked_for_are_absent(tmp_path):
    report = build_report(make_run(tmp_path, replace(SMALL, metrics=("ppl",))))
    names = set(report.variants[0].metrics)
    assert "ppl" in names
    assert not {name for name in names if "kl" in name or "mmlu" in name}
    assert (report.tasks, report.comparisons) == ([], [])


def test_mmlu_alone_needs_no_token_rows(tmp_path):
    report = build_report(make_run(tmp_path, replace(SMALL, metrics=("mmlu",))))
    assert set(report.baseline.metrics) == {"mmlu_acc", "mmlu_acc_macro", "mmlu_brier", "mmlu_ece"}
    assert report.baseline.backend == "torch"


def changed(name, key, change):
    """An edit of one variant's column."""

    def edit(variant, columns):
        return columns | {key: change(columns[key])} if variant == name else columns

    return edit


def without(name, keep):
    """An edit that leaves of one variant only the rows that `keep` says of their number."""

    def edit(variant, columns):
        if variant != name:
            return columns
        rows = [i for i in range(len(columns["variant"])) if keep(i)]
        return {key: [list(column)[i] for i in rows] for key, column in columns.items()}

    return edit


def put(index, value):
    def change(column):
        copy = list(column)
        copy[index] = value
        return copy

    return change


@pytest.mark.parametrize(
    ("kind", "edit", "sentence"),
    [
        ("tokens", without("awq", lambda i: i >= 32), r"'awq' has 352 token rows .* 384 \(window 0 is missing\)"),
        ("tokens", without("awq", lambda i: False), "'awq' has no token rows"),
        ("tokens", changed("awq", "token", put(33, 7)), "baseline's tokens: 1 rows .* window 1, position 1"),
        ("tokens", changed("awq", "position", put(34, 1)), "two rows for position 1 of window 1"),
        ("tokens", changed("awq", "kl_nats", put(5, None)), "383 KL values; the run scored 384"),
        ("tokens", changed("awq", "nll", put(5, None)), "log-likelihoods at other positions"),
        ("tokens", changed("awq", "top1_agreement", put(5, None)), "top1_agreement at other positions"),
        ("tokens", changed("awq", "corpus", put(5, "pydoc")), "several corpora"),
        ("tokens", without("baseline", lambda i: i >= 32), "cover 11 of 12 windows"),
        ("items", without("awq", lambda i: i != 3), "239 answers of 'mmlu' and the run asked 240"),
        ("items", changed("awq", "prompt_sha256", put(21, "other")), "1 prompts .* question 1 of 'anatomy'"),
        ("items", changed("awq", "item", put(21, 0)), "question 0 of 'anatomy' twice"),
        ("items", changed("awq", "gold", lambda g: (np.asarray(g) + 1) % 4), "240 gold differ"),
        ("items", changed("awq", "acc", put(2, None)), "without the harness's accuracy"),
        ("items", changed("awq", "choice_loglikelihoods", put(2, [])), "without any choice"),
        ("items", changed("baseline", "backend", put(2, "ort")), "baselines of several backends"),
    ],
)
def test_rows_that_do_not_pair_are_an_error_that_names_them(tmp_path, kind, edit, sentence):
    run = make_run(tmp_path, replace(SMALL, edits={kind: edit}))
    with pytest.raises(BrokenRecordError, match=sentence):
        build_report(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        build_report(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_variant_with_values_that_are_not_finite_is_broken_not_averaged(tmp_path, bad):
    report = build_report(make_run(tmp_path, replace(SMALL, edits={"tokens": changed("awq", "kl_nats", put(5, bad))})))
    broken = report.variants[2]
    assert (broken.status, broken.pareto, broken.kl_curve) == ("broken", False, None)
    assert "kl_nats (1 of 384)" in broken.error
    kl = broken.metrics["kl_nats"]
    assert (kl.value, kl.low, kl.high, kl.non_finite) == (None, None, None, 1)
    assert broken.metrics["top1_agreement"].value is None  # of the same logits
    assert "NaN" not in report_json(report)
    assert "Infinity" not in report_json(report)
    assert [v.status for v in report.variants[:2]] == ["done", "done"]
    assert "awq" not in {c.better_name for c in report.comparisons} | {c.other_name for c in report.comparisons}


@pytest.mark.parametrize("nll", [60.0, 800.0])
def test_a_perplexity_beyond_all_bounds_is_a_number_or_broken(tmp_path, nll):
    edit = changed("awq", "nll", lambda column: [None if old is None else nll for old in column])
    variant = build_report(make_run(tmp_path, replace(SMALL, edits={"tokens": edit}))).variants[2]
    expected = pytest.approx(np.exp(nll)) if nll < 700 else None
    assert variant.metrics["ppl"].value == expected
    assert variant.status == ("done" if nll < 700 else "broken")


def test_a_log_likelihood_that_is_not_finite_breaks_the_task_alone(tmp_path):
    edit = changed("awq", "choice_loglikelihoods", put(2, [-1.0, -np.inf, -2.0, -3.0]))
    broken = build_report(make_run(tmp_path, replace(SMALL, edits={"items": edit}))).variants[2]
    assert broken.status == "broken"
    assert (broken.metrics["mmlu_acc"].value, broken.metrics["mmlu_acc"].non_finite) == (None, 1)
    assert (broken.tasks["mmlu"].flips, broken.tasks["mmlu"].by_subject) == (None, {})
    assert broken.metrics["kl_nats"].value is not None


def test_a_baseline_that_is_not_finite_stops_the_report(tmp_path):
    run = make_run(tmp_path, replace(SMALL, edits={"tokens": changed("baseline", "nll", put(5, np.nan))}))
    with pytest.raises(QevalError, match=r"baseline.*ppl \(1 of 372\)"):
        build_report(run)


def test_a_failed_variant_keeps_its_error_and_has_no_metrics(tmp_path):
    run = make_run(tmp_path, replace(SMALL, edits={"tokens": without("awq", lambda i: False)}))
    record = json.loads((run / "run.json").read_text())
    record["variants"][2] |= {"status": "failed", "error": "The forward failed."}
    reseal(run, record)
    failed = build_report(run).variants[2]
    assert (failed.status, failed.error, failed.metrics) == ("failed", "The forward failed.", {})


def test_a_baseline_at_chance_is_said_to_be(tmp_path):
    report = build_report(make_run(tmp_path, replace(SMALL, skill=0.0)))
    assert report.tasks[0].chance == 0.25
    assert report.tasks[0].baseline_at_chance
    assert any("cannot be told from guessing" in note for note in report.notes)
    assert not build_report(make_run(tmp_path / "able", SMALL)).tasks[0].baseline_at_chance


def test_one_window_has_no_interval_and_says_so(tmp_path):
    report = build_report(make_run(tmp_path, replace(SMALL, windows=1, length=64)))
    kl = report.variants[0].metrics["kl_nats"]
    assert kl.value > 0
    assert (kl.low, kl.high) == (None, None)
    assert any("have no interval" in note for note in report.notes)


def test_few_windows_are_said_to_be_few(tmp_path):
    notes = build_report(make_run(tmp_path, replace(SMALL, windows=4))).notes
    assert any("4 windows" in note for note in notes)


def test_one_subject_is_resampled_by_its_questions(tmp_path):
    acc = build_report(make_run(tmp_path, replace(SMALL, subjects=("anatomy",)))).baseline.metrics["mmlu_acc"]
    assert acc.clusters == SMALL.questions
    assert acc.low < acc.value < acc.high


def test_neighbours_in_rank_are_compared_paired(report):
    first = report.comparisons[0]
    by_name = {v.name: v.metrics["kl_nats"] for v in report.variants}
    assert (first.better_name, first.other_name) == ("mixed", "awq")
    expected = by_name["mixed"].value - by_name["awq"].value
    assert first.difference.value == pytest.approx(expected)
    assert first.difference.high < 0


def test_pareto_front_is_what_nothing_beats(report):
    def at(name, size, kl):
        metric = Metric(value=kl, low=None, high=None, unit="nats", better="lower", n=1, clusters=1)
        update = {"name": name, "size_bytes": size, "metrics": {"kl_nats": metric}, "pareto": False}
        return report.variants[0].model_copy(update=update)

    points = [at("small", 10, 0.5), at("worse", 10, 0.6), at("big", 20, 0.1), at("beaten", 20, 0.5)]
    assert [v.name for v in mark_pareto(points) if v.pareto] == ["small", "big"]


def test_kl_curve_is_the_share_of_tokens_with_at_least_that_kl(run, report):
    kl = values(rows_of(run, "tokens", "rtn" if len(report.variants) > 3 else "awq"), "kl_nats")
    curve = report.variants[2].kl_curve
    assert curve.share[-1] == 1.0
    for share, at in list(zip(curve.share, curve.kl_nats, strict=True))[::20]:
        assert (kl >= at).mean() == pytest.approx(share)


def test_brier_score_and_calibration_error_are_their_definitions(run, report):
    before = rows_of(run, "items", "baseline")
    for variant in report.variants:
        now = rows_of(run, "items", variant.name)
        scores = {"now": [], "before": []}
        bins = [[] for _ in range(15)]
        for side, columns in (("now", now), ("before", before)):
            for row, gold in zip(columns["choice_loglikelihoods"], columns["gold"], strict=True):
                p = softmax_of(row)
                scores[side].append(sum((x - (i == gold)) ** 2 for i, x in enumerate(p)))
                if side == "now":
                    bins[min(int(max(p) * 15), 14)].append((max(p), p.index(max(p)) == gold))
        error = sum(abs(sum(right - p for p, right in one)) for one in bins) / len(scores["now"])
        assert variant.metrics["mmlu_brier"].value == pytest.approx(np.mean(scores["now"]))
        difference = np.mean(scores["now"]) - np.mean(scores["before"])
        assert variant.metrics["mmlu_brier_diff"].value == pytest.approx(difference, abs=1e-12)
        assert variant.metrics["mmlu_ece"].value == pytest.approx(error)
        assert 0 <= variant.metrics["mmlu_ece"].low <= variant.metrics["mmlu_ece"].high
    assert report.baseline.metrics["mmlu_brier"].value == pytest.approx(np.mean(scores["before"]))


def test_quantiles_of_the_true_tokens_change_are_those_of_the_rows(run, report):
    for variant in report.variants:
        delta = np.sort(values(rows_of(run, "tokens", variant.name), "delta_p"))
        for name, level in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
            found = variant.metrics[f"delta_p_{name}"]
            assert (delta <= found.value).mean() >= level
            assert (delta < found.value).mean() <= level
            assert found.low <= found.value <= found.high
