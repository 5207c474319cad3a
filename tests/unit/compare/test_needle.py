"""`--tasks needle` from end to end: rows, report, card and gate against the rows, and every refusal."""

import numpy as np
import pytest

from qeval.errors import BrokenRecordError
from qeval.gate.bounded_metrics import Figures
from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.report import build_report
from qeval.report.card.results import metadata
from qeval.report.measure_needle import needle_metrics
from qeval.report.needle_rows import needle_rows, pair_needles
from qeval.report.run_rows import PairedRun
from qeval.store.rows import RowStore
from qeval.store.run import read_run
from tests.fixtures.bench import Bench, refusing, row_files

LENGTHS, DEPTHS, HAYSTACKS = (700, 1000), (0.0, 0.5, 1.0), 3
FLAGS = {"methods": "rtn:g32", "tasks": "needle", "needle_lengths": "1000,700", "needle_depths": "3",
         "needle_haystacks": str(HAYSTACKS), "mmlu_dir": None, "shots": None, "corpus": None, "window": None,
         "stride": None, "max_windows": None}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run of needles alone lies in `out`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fixtures.bench.CONTEXT", 1024)
        place = Bench(tmp_path_factory.mktemp("needle"))
        patch.setenv("QEVAL_HOME", str(place.folder / "home"))
        assert place.compare("--quiet", **FLAGS) == 0
        yield place


@pytest.fixture(scope="module")
def table(bench):
    return RowStore(bench.out).read("needle")


@pytest.fixture(scope="module")
def report(bench):
    return build_report(bench.out)


def of(table, variant):
    rows = [row for row in table.to_pylist() if row["variant"] == variant]
    return sorted(rows, key=lambda row: (row["length"], row["haystack"], row["depth"]))


def test_rows_hold_every_needle_of_both_sides_asked_alike(table):
    base, variant = of(table, "baseline"), of(table, "rtn:g32")
    places = [(length, number, depth) for length in LENGTHS for number in range(HAYSTACKS) for depth in DEPTHS]
    for rows in (base, variant):
        assert [(row["length"], row["haystack"], row["depth"]) for row in rows] == places
        assert all(row["log_p"] < 0 and row["rank"] >= 1 for row in rows)
        assert all(row["prompt_tokens"] + row["answer_tokens"] <= row["length"] for row in rows)
    assert [row["prompt_sha256"] for row in base] == [row["prompt_sha256"] for row in variant]
    assert [row["log_p"] for row in base] != [row["log_p"] for row in variant]


def test_the_report_says_what_the_rows_do(bench, table, report):
    base, variant = (of(table, name) for name in ("baseline", "rtn:g32"))
    metrics = report.variants[0].metrics
    losses = [b["log_p"] - v["log_p"] for b, v in zip(base, variant, strict=True)]
    assert metrics["needle_loss_nats"].value == pytest.approx(np.mean(losses))
    assert metrics["needle_loss_nats"].clusters == len(LENGTHS) * HAYSTACKS
    assert metrics["needle_rank"].value == pytest.approx(np.exp(np.mean([np.log(row["rank"]) for row in variant])))
    assert metrics["needle_recall"].value == np.mean([row["rank"] == 1 for row in variant])
    assert report.baseline.metrics["needle_log_p_nats"].value == pytest.approx(np.mean([r["log_p"] for r in base]))

    cells = report.variants[0].needle
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in LENGTHS for d in DEPTHS]
    here = [i for i, row in enumerate(base) if (row["length"], row["depth"]) == (1000, 0.5)]
    assert cells[4].metrics["needle_loss_nats"].value == pytest.approx(np.mean([losses[i] for i in here]))
    text = (bench.out / "report.md").read_text(encoding="utf-8")
    assert "3 haystacks of 700 and 1,000 tokens each, with a needle at each of 3 depths" in text
    assert "| 1,000, 50 % |" in text


def test_card_and_gate_have_it(bench, report):
    figures = {result.metric_type for result in metadata(report, report.variants).eval_results}
    assert {"needle_recall", "needle_recall_drop", "needle_loss_nats"} <= figures
    loss = Figures(PairedRun(bench.out), read_run(bench.out).variants[0]).of("needle_loss_nats")
    assert loss.value == pytest.approx(report.variants[0].metrics["needle_loss_nats"].value)
    recall = {"metric": "needle_recall_drop", "at_most": "90 points"}
    for margin, code in (("90 nats", 0), ("-90 nats", 1)):
        rules = [{"metric": "needle_loss_nats", "at_most": margin}, recall]
        assert judge(bench.out, Policy.model_validate({"name": "p", "rules": rules})).exit_code == code


def test_the_same_command_computes_nothing_and_batches_change_no_key(bench):
    before = row_files(bench.out)
    assert bench.compare("--quiet", **FLAGS, batch_tokens="64") == 0
    assert row_files(bench.out) == before


def test_rows_that_are_missing_or_asked_otherwise_are_named(table, bench):
    record, rows = read_run(bench.out).needle, table.filter(np.asarray(table["variant"].to_pylist()) == "baseline")
    with pytest.raises(BrokenRecordError, match="'x' has 17 answers to needles, which are not one for each of 18"):
        needle_rows(rows.slice(1), record, "x")
    whole, other = needle_rows(rows, record, "x"), needle_rows(rows, record, "x")
    other.prompts[4] = "else"
    with pytest.raises(BrokenRecordError, match="'x' was not asked the baseline's needles: 1 prompts differ"):
        pair_needles(other, whole, "x")
    whole.log_p[0] = np.nan
    assert needle_metrics(whole, 0)["needle_recall"].non_finite == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"needle_lengths": "4096"}, "--needle-lengths 4096 is longer than the model's context of 1024"),
        ({"needle_lengths": "100"}, "--needle-lengths 100: 3 needles with 6 sentences between them take"),
        ({"needle_lengths": "1k"}, "--needle-lengths takes numbers of tokens such as 1024,4096, not '1k'"),
        ({"needle_lengths": ","}, "--needle-lengths names no number"),
        ({"needle_lengths": "0"}, "--needle-lengths must be at least 1, not 0"),
        ({"needle_depths": "51"}, "--needle-depths 51: a haystack has 50 keys at most"),
        ({"tasks": "mmlu"}, "--needle-lengths and its kin are for --tasks needle"),
    ],
)
def test_bad_input_is_one_sentence(bench, capfd, changed, message):
    assert message in refusing(bench, bench.folder / "refused", capfd)(**(FLAGS | changed))
