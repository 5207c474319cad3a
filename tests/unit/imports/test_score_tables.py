"""Tables of scores: paired by item, clustered by subject, repeats apart; gate, diff and card read them as any run."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats as scipy_stats

import qeval
from qeval.cli.app import run_program
from qeval.errors import BrokenRecordError, UsageError
from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.store.run import read_run

ITEMS = 60


def table(path, model_loss=0.0, *, seeds=1, seed=0, **columns):
    """A CSV of right and wrong answers, less often right by `model_loss`; items are called 000, 001, ..."""
    rng, chance = np.random.default_rng(seed), np.random.default_rng(9).random(ITEMS)
    lines = [",".join(["item", "score", "seed", "subject", *columns])]
    for item in range(ITEMS):
        for draw in range(seeds):
            right = int(rng.random() < chance[item] - model_loss)
            lines.append(",".join([f"{item:03d}", str(right), str(draw), f"s{item % 12}", *columns.values()]))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def files(tmp_path):
    return [table(tmp_path / "baseline.csv"), table(tmp_path / "rtn.csv", 0.3, seed=1)]


def test_a_drop_is_bounded_as_the_paired_difference_clustered_by_subject(files, tmp_path):
    """With repeats the bound is that of a t interval of the subjects' means, all of one size."""
    files = [table(tmp_path / "baseline.csv", seeds=3), table(tmp_path / "rtn.csv", 0.3, seeds=3, seed=1)]
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    (variant,) = judge(run.folder, gsm("gsm_score_loss", "0.1 units")).variants
    rule = variant.rules[0]
    means = []
    for path in files:
        rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
        scores = np.array([float(row[1]) for row in rows]).reshape(ITEMS, 3).mean(1)
        means.append([scores[np.arange(ITEMS) % 12 == subject].mean() for subject in range(12)])
    change = np.subtract(*means)
    low, high = scipy_stats.ttest_1samp(change, 0).confidence_interval(0.9)
    assert rule.value == pytest.approx(change.mean())
    assert rule.low <= low + 1e-9  # what a repeat adds to all items alike may widen it
    assert rule.high >= high - 1e-9
    assert (rule.n, rule.clusters) == (ITEMS, 12)


def gsm(metric, margin):
    return Policy.model_validate({"name": "p", "rules": [{"metric": metric, "at_most": margin}]})


def test_single_answers_have_flips_and_score_bounds(files, tmp_path):
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    right = [[int(line.split(",")[1]) for line in path.read_text().splitlines()[1:]] for path in files]
    lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in (right, right[::-1]))
    for metric, value in (
        ("gsm_flips", (lost + won) / ITEMS),
        ("gsm_right_to_wrong", lost / ITEMS),
        ("gsm_acc_drop", (lost - won) / ITEMS),
    ):
        unit = "points" if metric.endswith("drop") else "%"
        (variant,) = judge(run.folder, gsm(metric, f"5 {unit}")).variants
        assert variant.rules[0].value == pytest.approx(value)
    assert f"{lost} lost and {won} won" in variant.rules[0].why


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_forms_give_the_same_run(files, tmp_path, suffix):
    run = qeval.import_rows(files, out=tmp_path / "csv", task="gsm", higher_is_better=True)
    others = []
    for path in files:
        header, *lines = (line.split(",") for line in path.read_text().splitlines())
        rows = [dict(zip(header, line, strict=True)) | {"score": float(line[1])} for line in lines]
        others.append(path.with_suffix(suffix))
        if suffix == ".jsonl":
            others[-1].write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), others[-1])
    other = qeval.import_rows(others, out=tmp_path / "other", task="gsm", higher_is_better=True)
    assert other.metric("rtn", "gsm_score_diff") == run.metric("rtn", "gsm_score_diff")


def test_models_and_tasks_may_stand_in_columns(tmp_path):
    lines = ["model,task,item,score"]
    lines += [f"{m},{t},{i},{i % 2}" for m in ("fp16", "awq") for t in ("a", "b") for i in range(10)]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    run = qeval.import_rows(tmp_path / "all.csv", out=tmp_path / "run", baseline="fp16", higher_is_better=True)
    assert [score.name for score in run.record.scores] == ["a", "b"]
    assert run.record.model.name == "fp16"
    assert [variant.name for variant in run.record.variants] == ["awq"]


def test_lower_may_be_better(tmp_path):
    for name, more in (("baseline", 0.0), ("awq", 0.5)):
        rows = "\n".join(f"{i},{i % 7 + more + i / 100 * more}" for i in range(50))
        (tmp_path / f"{name}.csv").write_text("item,score\n" + rows)
    files = [tmp_path / "baseline.csv", tmp_path / "awq.csv"]
    run = qeval.import_rows(files, out=tmp_path / "run", task="loss", higher_is_better=False)
    assert judge(run.folder, gsm("loss_score_loss", "0.1 units")).outcome == "fail"
    assert judge(run.folder, gsm("loss_score_loss", "2 units")).outcome == "pass"
    assert judge(run.folder, gsm("loss_acc_drop", "2 points")).outcome == "broken"
    assert "loss: awq (+0.623" in str(run)  # 0.5 and half the mean of i / 100


def test_the_direction_must_be_said(files, tmp_path, capfd):
    code = run_program(["import", *map(str, files), "--task", "gsm", "--out", str(tmp_path / "run")])
    assert code == 2
    assert "say --higher-is-better or --lower-is-better" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_of_other_seeds_are_repeats_where_asked(tmp_path):
    files = [f"baseline={table(tmp_path / f'b{n}.csv', seed=n)}" for n in range(3)]
    files += [f"awq={table(tmp_path / f'a{n}.csv', seed=10 + n)}" for n in range(3)]
    with pytest.raises(UsageError, match=r"120 items of 'gsm' are doubled for 'baseline' .* with --repeats"):
        qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", repeats=True, higher_is_better=True)
    (variant,) = judge(run.folder, gsm("gsm_acc_drop", "5 points")).variants
    assert "3 repeats an item, whose own spread is" in variant.rules[0].why
    assert variant.rules[0].repeats is None or "repeats an item" in variant.rules[0].why


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,points\n1,1\n", "no column 'score'"),
        ("item,score\n", "holds no row"),
        ("item,score\n1,good\n", "row 1: the score 'good' is no number"),
        ("item,score,score\n1,1,1\n", "two columns called 'score'"),
        ("item,score\n1,1\n1,0\n", r"1 items of 'gsm' are doubled for 'awq' \(1 of 'scores'\)"),
        ("item,score\n5,1\n", r"59 of 61 items|60 of 61 items of 'gsm' are missing for 'awq'"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    (tmp_path / "base.csv").write_text("item,score\n" + "\n".join(f"{i:02d},1" for i in range(60)))
    (tmp_path / "awq.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        qeval.import_rows(
            [tmp_path / "base.csv", tmp_path / "awq.csv"], out=tmp_path / "run", task="gsm", higher_is_better=True
        )


def test_items_without_a_score_are_counted_and_break_the_rule(tmp_path):
    for name, score in (("baseline", "1"), ("awq", "")):
        rows = "\n".join(f"{i},{score if i in (2, 5) else i % 2}" for i in range(20))
        (tmp_path / f"{name}.csv").write_text("item,score\n" + rows)
    files = [tmp_path / "baseline.csv", tmp_path / "awq.csv"]
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    verdict = judge(run.folder, gsm("gsm_acc_drop", "5 points"))
    assert verdict.exit_code == 3
    assert "2 of 40 values are not finite" in verdict.variants[0].rules[0].why
    with pytest.raises(BrokenRecordError, match="2 items of 'gsm' without score"):
        qeval.diff(run, run)


def test_an_imported_run_says_what_it_does_not_know(files, tmp_path):
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    rules = [{"metric": "gsm_acc_drop", "at_most": "90 points"}]
    verdict = judge(run.folder, Policy.model_validate({"name": "p", "require": "quantized", "rules": rules}))
    assert (verdict.exit_code, verdict.variants[0].rules[0].outcome) == (4, "pass")
    assert "imported, so whether anything in it is quantized is not known" in verdict.variants[0].error
    for metric, margin, why in (
        ("kl_nats", "1 nats", "was imported and holds no 'kl'"), ("bits_per_weight", "5 bits", "gives 'rtn' no size"),
        ("gsm_choice_kl_nats", "1 nats", "no log-likelihoods of choices"),
    ):  # fmt: skip
        (variant,) = judge(run.folder, gsm(metric, margin)).variants
        assert (variant.outcome, why in variant.rules[0].why) == ("broken", True)


def test_a_checksum_is_verified_and_rows_are_not_computed_again(files, tmp_path):
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    assert qeval.verify(run, sample=0).exit_code == 0
    assert "The run was imported" in qeval.verify(run).undone


def test_a_known_direction_is_not_turned_by_the_flag(tmp_path):
    rows = "metric,item,score\n" + "\n".join(f"{m},{i},{i % 2}" for m in ("acc", "oddness") for i in range(9))
    for name in ("baseline", "awq"):
        (tmp_path / f"{name}.csv").write_text(rows)
    files = [tmp_path / "baseline.csv", tmp_path / "awq.csv"]
    run = qeval.import_rows(files, out=tmp_path / "run", task="t", higher_is_better=False)
    assert [(score.name, score.better) for score in run.record.scores] == [("t", "higher"), ("t_oddness", "lower")]


def test_card_diff_and_junit_are_those_of_any_run(files, tmp_path):
    run = qeval.import_rows(files, out=tmp_path / "run", task="gsm", higher_is_better=True)
    later = [table(tmp_path / "b2.csv"), table(tmp_path / "r2.csv", 0.6, seed=2)]
    other = qeval.import_rows(
        [f"baseline={later[0]}", f"rtn={later[1]}"], out=tmp_path / "other", task="gsm", higher_is_better=True
    )
    text = qeval.card(run).card.read_text()
    assert "### gsm" in text
    assert "Bits/weight" not in text
    (difference,) = qeval.diff(run, other).variants[0].differences
    assert difference.difference.value == pytest.approx(
        other.metric("rtn", "gsm_score").value - run.metric("rtn", "gsm_score").value
    )
    qeval.gate(run, gsm("gsm_acc_drop", "1 points"), junit=tmp_path / "j.xml")
    assert "gsm_acc_drop at most 1 points" in (tmp_path / "j.xml").read_text()


def test_import_and_gate_take_no_torch(files, tmp_path):
    (tmp_path / "p.yaml").write_text("name: p\nrules:\n  - {metric: gsm_acc_drop, at_most: 99 points}\n")
    code = (
        "import sys; from qeval.cli.app import run_program as run\n"
        f"assert run(['import', {str(files[0])!r}, {str(files[1])!r}, '--task', 'gsm', '--out', "
        f"{str(tmp_path / 'run')!r}, '--higher-is-better', '--quiet']) == 0\n"
        f"assert run(['gate', {str(tmp_path / 'run')!r}, '--policy', {str(tmp_path / 'p.yaml')!r}, '--quiet']) == 0\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert read_run(tmp_path / "run").imported.files[0].name == "baseline.csv"
