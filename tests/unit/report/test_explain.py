"""`qeval explain` against slow definitions, and what it says of runs that are not sound."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from qeval.cli.app import run_program as program
from qeval.errors import BrokenRecordError, UsageError
from qeval.report.explain import build_explanation, explanation_json
from qeval.report.explain.build import TOKENS
from qeval.report.explain.layers import layers_loss
from qeval.report.explain.tables import explanation_tables
from qeval.report.render import render
from qeval.stats.flips import holm, mcnemar
from qeval.store.rows import RowStore
from qeval.store.run import GroupRecord
from qeval.store.texts import WindowText, read_texts, write_texts
from tests.fixtures.runs import SEVEN, Shape, make_run, reseal

SMALL = Shape(variants=SEVEN[:4], windows=12, length=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), SMALL)


@pytest.fixture(scope="module")
def found(run):
    return build_explanation(run, "rtn")


def rows_of(run, kind, variant):
    return [row for row in RowStore(run).read(kind).to_pylist() if row["variant"] == variant]


def edited(run, change):
    record = json.loads((run / "run.json").read_text())
    change(record)
    reseal(run, record)
    return run


def test_every_changed_answer_is_there_with_both_probabilities(run, found):
    base = {(r["subject"], r["item"]): r for r in rows_of(run, "items", "baseline")}
    mine = {(r["subject"], r["item"]): r for r in rows_of(run, "items", "rtn")}
    changed = {(c.subject, c.item): c for c in found.tasks[0].changed}
    assert set(changed) == {key for key in base if base[key]["pred"] != mine[key]["pred"]}
    assert len(changed) > 10
    for key, one in changed.items():
        p = special.softmax(base[key]["choice_loglikelihoods"])
        q = special.softmax(mine[key]["choice_loglikelihoods"])
        assert one.baseline_probabilities == pytest.approx(p)
        assert one.variant_probabilities == pytest.approx(q)
        assert (one.baseline_answer, one.variant_answer) == (p.argmax(), q.argmax())
        gold = base[key]["gold"]
        assert one.gold_change == pytest.approx(q[gold] - p[gold])
        assert one.baseline_margin == pytest.approx(sorted(p)[-1] - sorted(p)[-2])
        right = "right" if base[key]["pred"] == gold else "wrong"
        now = "right" if mine[key]["pred"] == gold else "wrong" if right == "right" else "other"
        assert one.went == (f"{right}_to_{now}")
        assert one.question == f"Question {one.item} of {one.subject}?"
    assert [c.gold_change for c in found.tasks[0].changed] == sorted(c.gold_change for c in found.tasks[0].changed)


def test_groups_are_taken_apart_and_tested_together(run, found):
    base, mine = rows_of(run, "items", "baseline"), rows_of(run, "items", "rtn")
    task = found.tasks[0]
    assert [g.difference.value for g in task.subjects] == sorted(g.difference.value for g in task.subjects)
    for group in task.subjects:
        pairs = [(b, m) for b, m in zip(base, mine, strict=True) if b["subject"] == group.name]
        lost = sum(b["pred"] == b["gold"] != m["pred"] for b, m in pairs)
        won = sum(m["pred"] == b["gold"] != b["pred"] for b, m in pairs)
        assert (group.right_to_wrong, group.wrong_to_right, group.questions) == (lost, won, len(pairs))
        assert group.difference.value == pytest.approx((won - lost) / len(pairs))
        assert group.p_value == (pytest.approx(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0)
        kl = [special.rel_entr(*(special.softmax(r["choice_loglikelihoods"]) for r in pair)).sum() for pair in pairs]
        assert group.choice_kl_nats == pytest.approx(np.mean(kl))
    adjusted = holm([g.p_value for g in task.subjects])
    assert [g.p_adjusted for g in task.subjects] == pytest.approx(adjusted)
    assert sum(g.questions for g in task.categories) == task.questions
    assert len(task.categories) == 4


def test_the_tokens_with_the_largest_kl_stand_in_their_context(run, found):
    mine, base = rows_of(run, "tokens", "rtn"), rows_of(run, "tokens", "baseline")
    at = {(r["window"], r["position"]): r for r in mine}
    before = {(r["window"], r["position"]): r for r in base}
    kl = sorted((r["kl_nats"] for r in mine), reverse=True)
    worst = found.tokens.worst
    assert [one.kl_nats for one in worst] == pytest.approx(kl[:TOKENS])
    assert found.tokens.worst_shares == pytest.approx([sum(kl[:n]) / sum(kl) for n in (1, 4, 38)])
    assert found.tokens.mean_kl_nats == pytest.approx(np.mean(kl))
    assert any(one.position == SMALL.length - 1 for one in worst)
    for one in worst:
        row, after = at[one.window, one.position], at.get((one.window, one.position + 1))
        assert one.token == row["token"]
        assert one.top1_agreement == row["top1_agreement"]
        assert one.before.endswith(f" w{row['token']}")
        assert one.next == (f" w{after['token']}" if after else "")
        if after:
            assert one.next_token == after["token"]
            assert one.variant_probability == pytest.approx(np.exp(-after["nll"]))
            assert one.baseline_probability == pytest.approx(np.exp(-before[one.window, one.position + 1]["nll"]))
            assert one.variant_probability - one.baseline_probability == pytest.approx(after["delta_p"])
        else:
            assert (one.next_token, one.baseline_probability, one.variant_probability) == (None, None, None)


def test_layers_have_their_share_at_the_width_they_were_given(run):
    loss = build_explanation(run, "mixed").layers
    groups = json.loads((run / "run.json").read_text())["variants"][0]["groups"]
    own = [g["kl_high"] if g["bits"] == 8 else g["kl_low"] for g in groups]
    assert {g["bits"] for g in groups} == {4, 8}
    assert loss.sum_kl_nats == pytest.approx(sum(own))
    assert sum(layer.share for layer in loss.layers) == pytest.approx(1)
    assert [x.share for x in loss.layers] == sorted((x.share for x in loss.layers), reverse=True)
    by_layer = {x.layer: x for x in loss.layers}
    assert by_layer[7].kl_nats == pytest.approx(sum(kl for g, kl in zip(groups, own, strict=True) if g["layer"] == 7))
    assert sum(by_layer[7].kinds.values()) == pytest.approx(by_layer[7].share)
    assert loss.additivity == pytest.approx(sum(own) / build_explanation(run, "mixed").tokens.mean_kl_nats)
    assert loss.unmeasured == 0


def group(layer, bits, low, high):
    return GroupRecord(layer=layer, kind="o", names=[], parameters=1, kl_low=low, kl_high=high, bits=bits)


def test_groups_without_a_sensitivity_are_counted_and_none_has_no_table(run):
    assert build_explanation(run, "mixed-rtn").layers is None  # by position: nothing was measured
    assert layers_loss([], 1.0) is None
    loss = layers_loss([group(0, 4, 0.3, 0.1), group(1, 8, 0.2, None)], None)
    assert (loss.unmeasured, loss.additivity, loss.sum_kl_nats) == (1, None, 0.3)
    assert layers_loss([group(0, 8, 0.3, 0.1)], None).sum_kl_nats == 0.1  # all at the high width
    assert layers_loss([group(0, 4, 0.3, 0.1)], None).sum_kl_nats == 0.3


def test_mcnemar_without_a_flip_tells_nothing():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 * 0.5**6)


def test_holm_is_the_slow_definition():
    p = np.random.default_rng(0).uniform(0, 0.2, 9).tolist()
    ranked = sorted(p)
    slow = [max(min(1.0, (9 - j) * ranked[j]) for j in range(ranked.index(value) + 1)) for value in p]
    assert holm(p) == pytest.approx(slow)
    assert holm([]) == []


def test_json_holds_all_and_the_terminal_a_few(run, found, capfd):
    assert program(["explain", str(run), "rtn", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told == json.loads(explanation_json(found))
    assert (told["schema_version"], told["variant"], told["role"]) == (1, "rtn", "variant")
    assert program(["explain", str(run), "mixed", "--limit", "3"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    for part in ("answers that changed", "right → wrong", "subjects by loss", "Tokens with the largest KL", "Layer 28"):
        assert part in text
    for table in explanation_tables(found, 3):
        assert len(table.rows) <= 3
        assert "3 of " in table.note or "All " in table.note


def test_a_run_without_texts_shows_numbers_and_says_so(tmp_path, capfd):
    bare = make_run(tmp_path, replace(SMALL, texts=False))
    found = build_explanation(bare, "rtn")
    assert found.tasks[0].changed[0].question is None
    assert found.tokens.worst[0].before is None
    assert "kept no texts" in found.notes[0]
    assert program(["explain", str(bare), "rtn"]) == 0
    text = capfd.readouterr().out
    assert f"token {found.tokens.worst[0].token}" in text
    assert "run the same command again" in text
    assert render(bare).html.exists()


def test_texts_of_other_tokens_are_an_error(tmp_path):
    run = make_run(tmp_path, SMALL)
    windows = [WindowText(w, tuple(range(32)), ("x",) * 32) for w in range(12)]
    write_texts(run, windows, read_texts(run).task("mmlu").values())
    reseal(run)
    with pytest.raises(BrokenRecordError, match=r"texts of window \d+ are of other tokens than its rows"):
        build_explanation(run, "rtn")


def test_a_baseline_at_chance_is_said_to_be_in_words_and_beside_its_figure(tmp_path, capfd):
    run = make_run(tmp_path, replace(SMALL, skill=0.0))
    assert program(["explain", str(run), "rtn"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert "cannot be told from guessing" in text
    assert re.search(r"% \[[\d., ]+\] \(at chance\) of the baseline", text)
    html = render(run).html.read_text(encoding="utf-8")
    section = html[html.index('<section id="rows"') : html.index('<section id="layers"')]
    assert "cannot be told from guessing" in section


def test_the_noise_floor_is_explained_as_such_and_never_ranked(tmp_path):
    def mark(record):
        record["variants"][3] |= {"role": "floor"}

    run = edited(make_run(tmp_path, SMALL), mark)
    found = build_explanation(run, "rtn")
    assert found.role == "floor"
    assert "noise floor" in found.notes[0]
    text = render(run).html.read_text(encoding="utf-8")
    section = text[text.index('<section id="rows"') : text.index('<section id="layers"')]
    assert ">rtn\n" not in section
    assert "The noise floor (rtn: the baseline against itself)" in text
    assert "mixed, mixed-rtn and awq lie no higher: inconclusive, not better" in text
    assert "3 quantized variants" in text


def test_what_is_not_finite_is_counted_and_left_out(tmp_path):
    def tokens(name, columns):
        return columns | {"kl_nats": [float("nan"), *columns["kl_nats"][1:]]} if name == "rtn" else columns

    def items(name, columns):
        scores = columns["choice_loglikelihoods"]
        return columns | {"choice_loglikelihoods": [[float("nan")] * 4, *scores[1:]]} if name == "rtn" else columns

    run = make_run(tmp_path, replace(SMALL, edits={"tokens": tokens, "items": items}))
    found = build_explanation(run, "rtn")
    assert (found.tasks, found.tokens) == ([], None)
    assert found.notes == [
        "Tokens: 1 of 384 values are not finite, so nothing of them is shown.",
        "MMLU-style sample 5-shot: 1 of 240 values are not finite, so nothing of them is shown.",
    ]


def test_an_unknown_variant_is_refused_with_the_nearest(run, capfd):
    with pytest.raises(UsageError, match=r"Unknown variant of the run '.*' 'awk'; nearest: awq"):
        build_explanation(run, "awk")
    assert program(["explain", str(run), "awk"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_failed_variant_has_nothing_to_explain(tmp_path):
    def fail(record):
        record["variants"][3] |= {"status": "failed", "error": "Out of memory."}

    with pytest.raises(BrokenRecordError, match=r"'rtn' failed in this run and has no rows: Out of memory\."):
        build_explanation(edited(make_run(tmp_path, SMALL), fail), "rtn")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capfd):
    assert program(["explain", str(tmp_path), "rtn"]) == 2
    assert "holds no run" in capfd.readouterr().err


def test_a_run_of_another_schema_version_is_refused(tmp_path, capfd):
    run = edited(make_run(tmp_path, SMALL), lambda record: record.update(run_version=3))
    assert program(["explain", str(run), "rtn"]) == 3
    assert "of another version (run_version" in capfd.readouterr().err


def test_an_empty_run_is_an_error(tmp_path, capfd):
    run = make_run(tmp_path, replace(SMALL, metrics=()))
    assert program(["explain", str(run), "rtn"]) == 3
    assert "is empty: it scored no tokens and no questions" in capfd.readouterr().err


def test_rows_missing_for_some_items_are_named_and_counted(tmp_path, capfd):
    def short(name, columns):
        return {key: list(column)[3:] for key, column in columns.items()} if name == "rtn" else columns

    run = make_run(tmp_path, replace(SMALL, edits={"items": short}))
    assert program(["explain", str(run), "rtn"]) == 3
    said = "237 answers of 'mmlu' and the run asked 240 questions (3 missing, the first is question 0 of 'abstract_alg"
    assert said in capfd.readouterr().err


def test_explaining_needs_no_torch(run):
    code = (
        "import sys; from qeval.cli.app import run_program; code = run_program(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", str(run), "rtn"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
