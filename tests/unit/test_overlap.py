"""What calibration and scored text share: against sets of tuples, and what a find does to reports and gates."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qeval.cli.app import run
from qeval.report import build
from qeval.tasks import overlap
from qeval.tasks.corpus import pydoc_text
from qeval.tasks.overlap import find_overlap
from tests.fixtures.bench import Bench
from tests.fixtures.runs import Shape, make_run

texts = st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=4)


def slow(calibration, scored, ngram):
    """By its definition, with sets of tuples."""
    known = {tuple(ids[i : i + ngram]) for ids in calibration for i in range(len(ids) - ngram + 1)}
    covered = [
        {j for i in range(len(ids) - ngram + 1) if tuple(ids[i : i + ngram]) in known for j in range(i, i + ngram)}
        for ids in scored
    ]
    first = next((number for number, found in enumerate(covered) if found), None)
    return sum(map(len, covered)), sum(map(len, scored)), first


@given(texts, texts, st.integers(1, 6), st.integers(1, 9))
def test_shared_tokens_are_those_of_the_slow_definition(calibration, scored, ngram, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_AT_ONCE", at_once)
        found = find_overlap(calibration, scored, ngram)
    assert (found.shared_tokens, found.tokens, found.first) == slow(calibration, scored, ngram)


@given(texts, texts, st.integers(1, 4))
def test_runs_of_one_hash_are_told_apart_token_by_token(calibration, scored, ngram):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_hashes", lambda ids, n: np.zeros(max(len(ids) - n + 1, 0), np.uint64))
        found = find_overlap(calibration, scored, ngram)
    assert (found.shared_tokens, found.tokens, found.first) == slow(calibration, scored, ngram)


def test_the_halves_of_pydoc_share_no_run_of_words():
    calibration, test = (pydoc_text(part).split() for part in ("calibration", "test"))
    words = {word: number for number, word in enumerate({*calibration, *test})}
    found = find_overlap([[words[w] for w in calibration]], [[words[w] for w in test]], ngram=16)
    assert found.shared_tokens == 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("overlap")
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        made = Bench(folder)
        assert made.compare("--quiet", calibration=str(made.corpus), methods="rtn:g32,awq:g32", tasks="kl,ppl") == 0
    return made


def test_a_variant_calibrated_on_what_is_scored_is_void_at_the_top_and_beside_its_figures(bench):
    report = bench.report()
    rtn, awq = report["variants"]
    assert rtn["void"] is None
    assert awq["void"].startswith("128 of 256 scored tokens (the first in window 0) lie in runs of 32 tokens")
    assert report["warnings"][0] == awq["void"]
    assert (rtn["pareto"], awq["pareto"]) == (True, False)
    for name in ("report.md", "report.html"):
        page = (bench.out / name).read_text()
        assert "its figures are void" in page
        assert "void: calibrated on what it was scored on" in page


def test_a_gate_never_passes_a_void_variant(bench, tmp_path, capfd):
    policy = tmp_path / "lax.yaml"
    policy.write_text("name: lax\nrules:\n  - metric: kl_nats\n    at_most: 1000 nats\n")
    assert run(["gate", str(bench.out), "--policy", str(policy), "--variant", "rtn:g32"]) == 0
    assert run(["gate", str(bench.out), "--policy", str(policy), "--variant", "awq:g32"]) == 3
    assert "figures are void" in " ".join(capfd.readouterr().out.split())


def test_a_variant_made_before_on_other_tokens_is_said_not_to_be_checked(tmp_path):
    folder = make_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["variants"][0]["calibration_sha256"] = "ab" * 32
    (folder / "run.json").write_text(json.dumps(record))

    assert any("was not looked for" in note for note in build(folder).notes)
    assert not any("was not looked for" in note for note in build(make_run(tmp_path / "other", Shape())).notes)


def test_a_variant_made_before_on_what_is_scored_is_void_where_the_same_calibration_is_named(bench, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))
    seen = ("--calibration", str(bench.corpus), "--calibration-samples", "4", "--calibration-length", "32")
    made, out = bench.folder / "made", bench.folder / "given"
    assert run(["quantize", "--model", str(bench.model), "--method", "awq:g32", *seen, "--out", str(made)]) == 0
    given = ("--quiet", "--variant", f"mine={made}")
    assert bench.compare(*given, calibration=str(bench.corpus), methods=None, tasks="kl,ppl", out=str(out)) == 0
    assert bench.report(out)["variants"][0]["void"].startswith("128 of 256 scored tokens (the first in window 0)")
    assert bench.compare(*given, methods=None, tasks="kl,ppl", out=str(out)) == 0
    assert bench.report(out)["variants"][0]["void"] is None
    assert any("was not looked for" in note for note in bench.report(out)["notes"])


def test_a_card_has_no_figures_of_a_void_variant(bench, capfd):
    assert run(["card", str(bench.out), "--variant", "awq:g32"]) == 3
    assert "is void" in capfd.readouterr().err


def test_it_is_said_before_the_work(bench, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))
    assert bench.compare(calibration=str(bench.corpus), methods="rtn:g32,awq:g32", tasks="kl,ppl") == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "128 of 256 scored tokens stand in the calibration text 'corpus.txt' too" in said
