"""What calibration and scored text share: against sets of tuples, and what a find does to reports and gates."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qeval.cli.app import run_program
from qeval.errors import BrokenRecordError
from qeval.report import build_report
from qeval.tasks import contamination
from qeval.tasks.contamination import Fingerprint, find_overlap
from qeval.tasks.corpus import pydoc_text
from tests.fixtures.bench import Bench
from tests.fixtures.runs import Shape, make_run, reseal

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
        patch.setattr(contamination, "_AT_ONCE", at_once)
        found = find_overlap(calibration, scored, ngram)
    assert (found.shared_tokens, found.tokens, found.first) == slow(calibration, scored, ngram)


@given(texts, texts, st.integers(1, 4))
def test_runs_of_one_hash_are_told_apart_token_by_token(calibration, scored, ngram):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_hashes", lambda ids, n: np.zeros(max(len(ids) - n + 1, 0), np.uint64))
        found = find_overlap(calibration, scored, ngram)
    assert (found.shared_tokens, found.tokens, found.first) == slow(calibration, scored, ngram)


@given(texts, texts, st.integers(1, 6), st.integers(1, 4))
def test_a_fingerprint_finds_the_runs_that_it_has_and_no_other(calibration, scored, ngram, stride):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_STRIDE", stride)
        made = Fingerprint.of(calibration, ngram)
    kept = [ids[i : i + ngram] for ids in calibration for i in range(0, len(ids) - ngram + 1, stride)]
    again = Fingerprint.read(json.loads(made.model_dump_json()), "here")
    found = again.overlap(scored)
    assert (found.shared_tokens, found.tokens, found.first) == slow(kept, scored, ngram)


def test_a_fingerprint_finds_any_run_of_47_tokens_and_is_bounded():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50000, 3000).tolist()
    made = Fingerprint.of([text])
    for start in range(500, 520):
        found = made.overlap([[*rng.integers(0, 50000, 9).tolist(), *text[start : start + 47]]])
        assert found.shared_tokens >= 32
    assert made.overlap([rng.integers(0, 50000, 3000).tolist()]).shared_tokens == 0
    assert len(made.values()) == -(-(3000 - 31) // 16)
    huge = Fingerprint.of([rng.integers(0, 50000, 2_000_000)])
    assert len(huge.hashes) < 700_000
    assert Fingerprint.of([[1, 2]]).overlap([text]).shared_tokens == 0


@pytest.mark.parametrize("change", [{"version": 2}, {"hashes": "???"}, {"hashes": "AAAA"}, {"stride": 0}])
def test_a_torn_fingerprint_is_named(change):
    with pytest.raises(BrokenRecordError, match="here holds a fingerprint that is torn"):
        Fingerprint.read(Fingerprint.of([list(range(40))]).model_dump() | change, "here")


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
    assert run_program(["gate", str(bench.out), "--policy", str(policy), "--variant", "rtn:g32"]) == 0
    assert run_program(["gate", str(bench.out), "--policy", str(policy), "--variant", "awq:g32"]) == 3
    assert "figures are void" in " ".join(capfd.readouterr().out.split())


def test_a_variant_made_before_on_other_tokens_is_said_not_to_be_checked(tmp_path):
    folder = make_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["variants"][0]["calibration_sha256"] = "ab" * 32
    reseal(folder, record)

    assert any("was not looked for" in note for note in build_report(folder).notes)
    assert not any("was not looked for" in note for note in build_report(make_run(tmp_path / "other", Shape())).notes)


def test_a_variant_of_another_command_is_looked_at_by_its_fingerprint(bench, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))
    seen = {"mine": bench.corpus, "other": bench.seen}
    for name, text in seen.items():
        made = [
            "--calibration",
            str(text),
            "--calibration-samples",
            "4",
            "--calibration-length",
            "64",
            "--quiet",
            "--device",
            "cpu",
        ]
        own = ["--model", str(bench.model), "--method", "awq:g32", "--out", str(bench.folder / name)]
        assert run_program(["quantize", *own, *made]) == 0
    out = bench.folder / "given"
    given = [word for name in seen for word in ("--variant", f"{name}={bench.folder / name}")]
    assert bench.compare(*given, methods="rtn:g32", tasks="kl,ppl", out=str(out)) == 0
    assert "256 of 256 scored tokens" in " ".join(capfd.readouterr().err.split())
    report = bench.report(out)
    void = {variant["name"]: variant["void"] for variant in report["variants"]}
    assert void["mine"].startswith("At least 256 of 256 scored tokens (the first in window 0) lie in runs of 32 tokens")
    assert (void["other"], void["rtn:g32"]) == (None, None)
    assert not any("not looked for" in note for note in report["notes"])


def test_a_card_has_no_figures_of_a_void_variant(bench, capfd):
    assert run_program(["card", str(bench.out), "--variant", "awq:g32"]) == 3
    assert "is void" in capfd.readouterr().err


def test_it_is_said_before_the_work(bench, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))
    assert bench.compare(calibration=str(bench.corpus), methods="rtn:g32,awq:g32", tasks="kl,ppl") == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "128 of 256 scored tokens stand in the calibration text 'corpus.txt' too" in said
