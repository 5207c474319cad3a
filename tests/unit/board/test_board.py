"""A board of imported runs: figures over time, changes, what was accepted, and the gate against it."""

import re
import sqlite3

import numpy as np
import pytest

import qeval
from qeval.board.history import DATABASE, board_runs, last_accepted, read_figures
from qeval.board.page import change_sentences, read_series
from qeval.cli.app import run_program
from qeval.errors import QevalError, UsageError
from qeval.gate.policy import Policy
from qeval.store.run import read_run, write_run
from tests.fixtures.runs import SUBJECTS, Made, Shape, make_run, reseal

NIGHTS = 12
CHANGED = 6
ITEMS = 300


def night(folder, number, *, items=ITEMS, changed=False):
    """One night's run: the baseline's scores are always the same, awq's fall in the night when it changed."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(5).random(items)
    for name, loss, seed in (("baseline", 0.0, 0), ("awq", 0.45 if changed else 0.02, number + 100)):
        draws = np.random.default_rng(seed).random(items)
        rows = [f"{i},{int(draws[i] < chance[i] - loss)}" for i in range(items)]
        (folder / f"{name}.csv").write_text("item,score\n" + "\n".join(rows))
    out = folder / f"night{number}"
    files = [folder / "baseline.csv", folder / "awq.csv"]
    qeval.import_rows(files, out=out, task="gsm", higher_is_better=True)
    record = read_run(out).model_copy(update={"started": f"2026-01-{number + 1:02d}T02:00:00+00:00"})
    write_run(out, record)
    return out


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    root = tmp_path_factory.mktemp("nights")
    return [night(root / str(number), number, changed=number >= CHANGED) for number in range(NIGHTS)]


@pytest.fixture(scope="module")
def board(nights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    qeval.board(nights[:3], out=folder, accept=True)
    qeval.board(reversed(nights), out=folder)
    return folder


def test_runs_stand_in_the_order_of_time_with_their_own_figures(board, nights):
    runs = board_runs(board)
    assert [run.name for run in runs] == [f"night{number}" for number in range(NIGHTS)]
    assert [run.accepted for run in runs] == [True] * 3 + [False] * (
        NIGHTS - 3
    )  # adding again takes no acceptance back
    figures = {(f.run.name, f.variant, f.metric): f for f in read_figures(board)}
    own = qeval.load(nights[5]).metric("awq", "gsm_score_diff")
    of_board = figures["night5", "awq", "gsm_score_diff"]
    assert (of_board.value, of_board.low, of_board.high) == (own.value, own.low, own.high)


def test_the_change_is_told_with_its_run_and_the_rate_of_false_alarms(board):
    series = {(each.variant, each.metric): each for each in read_series(board)}
    assert series["awq", "gsm_score"].change.place == CHANGED
    assert not series["baseline", "gsm_score"].is_changed
    told = " ".join(change_sentences(list(series.values())))
    assert re.search(r"awq, gsm_score: from [\d.]+ % to [\d.]+ % with the run 'night6' of 2026-01-07", told)
    assert "baseline" not in told
    assert "alse alarms: at most 5%" in told
    page = (board / "board.html").read_text()
    assert "night7" in page
    assert "gsm_score over time" in page
    assert (board / "plots" / "trend-gsm_score.svg").is_file()


def test_a_run_of_another_token_hash_is_refused_and_both_are_named(board, tmp_path):
    other = night(tmp_path / "other", 0, items=ITEMS - 1)
    hashes = read_run(other).witness, board_runs(board)[0].token_hash
    with pytest.raises(UsageError, match=f"its token hash is {hashes[0]} and the board's {hashes[1]}"):
        qeval.board([other], out=board)
    assert len(board_runs(board)) == NIGHTS


def test_the_gate_compares_with_the_last_accepted_run(board, nights, tmp_path, capfd):
    assert last_accepted(board).resolve() == nights[2].resolve()
    policy = Policy.model_validate({"name": "p", "rules": [{"metric": "gsm_acc_drop", "at_most": "15 points"}]})
    for number, outcome in ((3, "pass"), (7, "fail")):
        verdict = qeval.gate(nights[number], policy, against=board)
        rule = verdict.variants[0].rules[0]
        scores = [qeval.load(nights[place]).metric("awq", "gsm_score").value for place in (2, number)]
        assert rule.value == pytest.approx(scores[0] - scores[1])
        assert verdict.outcome == outcome
        assert "held against itself in the run 'night2' of 2026-01-03" in " ".join(verdict.notes)
    (tmp_path / "p.yaml").write_text("name: p\nrules:\n  - {metric: gsm_acc_drop, at_most: 15 points}\n")
    words = ["gate", str(nights[7]), "--policy", str(tmp_path / "p.yaml"), "--against", str(nights[2])]
    assert run_program(words) == 1
    assert "held against itself" in re.sub(r"\s+", " ", capfd.readouterr().out)


def test_qevals_own_runs_are_held_against_themselves_in_perplexity_and_answers(tmp_path):
    made = Made("rtn", "rtn", "int4-g128", "block 128", 4.13, 0.02)
    worse = Made("rtn", "rtn", "int4-g128", "block 128", 4.13, 0.4)
    hashes = {"record": {"witness": "w" * 64}}
    folders = []
    for name, each in (("a", made), ("b", worse)):
        folders.append(make_run(tmp_path / name, Shape(variants=(each,), subjects=tuple(SUBJECTS), **hashes)))
        reseal(folders[-1])
    rules = [{"metric": "ppl_increase", "at_most": "1 %"}, {"metric": "kl_nats", "at_most": "1 nats"}]
    policy = Policy.model_validate(
        {"name": "p", "rules": [*rules, {"metric": "mmlu_acc_drop", "at_most": "90 points"}]}
    )
    increase, kl, drop = qeval.gate(folders[1], policy, against=folders[0]).variants[0].rules
    ratios = [qeval.load(folder).metric("rtn", "ppl_ratio").value for folder in folders]
    assert increase.value == pytest.approx(ratios[1] / ratios[0] - 1)
    assert increase.outcome == "fail"
    assert (kl.outcome, "says nothing against another run" in kl.why) == ("broken", True)
    accuracies = [qeval.load(folder).metric("rtn", "mmlu_acc").value for folder in folders]
    assert drop.value == pytest.approx(accuracies[0] - accuracies[1])


def test_a_board_without_runs_is_refused(tmp_path):
    assert run_program(["board", "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_a_board_without_an_accepted_run_and_a_torn_one_are_told(nights, tmp_path):
    qeval.board(nights[:1], out=tmp_path / "b")
    policy = Policy.model_validate({"name": "p", "rules": [{"metric": "gsm_acc_drop", "at_most": "1 points"}]})
    with pytest.raises(UsageError, match=r"No run on the board .* was accepted"):
        qeval.gate(nights[1], policy, against=tmp_path / "b")
    with sqlite3.connect(tmp_path / "b" / DATABASE) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(QevalError, match="torn or of another version"):
        qeval.board(nights[:1], out=tmp_path / "b")
    assert run_program(["gate", "--against", str(tmp_path), "--policy", "x"]) == 2
