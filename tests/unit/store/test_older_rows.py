"""Runs of versions before: their rows lack columns, and are read without them."""

import pytest

from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.imports.foreign_rows import Declarations, SourceFile
from qeval.imports.import_run import import_files
from qeval.report import build_report
from qeval.store import rows
from qeval.store.check import check_folder
from qeval.store.schema import NEWER_COLUMNS, OLDER_SCORES_SCHEMA, TOKENS_SCHEMAS, older_tokens_schema
from tests.fixtures.runs import SEVEN, Shape, make_run

SHAPE = Shape(variants=SEVEN[:3], windows=12, length=32)


@pytest.mark.parametrize(("changes", "metric"), [(0, "overlap"), (1, "top5_agreement")])
def test_a_run_from_before_a_column_is_read_without_it(tmp_path, monkeypatch, changes, metric):
    with monkeypatch.context() as patch:
        patch.setitem(rows.SCHEMAS, "tokens", older_tokens_schema(changes))
        folder = make_run(tmp_path / "old", SHAPE)
    old, new = build_report(folder), build_report(make_run(tmp_path / "new", SHAPE))
    missing = {name for names in NEWER_COLUMNS[changes:] for name in names}
    for before, now in zip(old.variants, new.variants, strict=True):
        assert metric in missing - before.metrics.keys()
        assert {name: each for name, each in now.metrics.items() if name not in missing} == before.metrics
    assert not check_folder(folder).problems
    rules = [{"metric": metric, "at_least": "1 %"}]
    verdict = judge(folder, Policy.model_validate({"name": "p", "rules": rules}))
    assert verdict.exit_code == 3
    assert f"The run scored no row for {metric}." in str(verdict.variants[0])
    assert judge(tmp_path / "new", Policy.model_validate({"name": "p", "rules": rules})).exit_code == 0


def test_an_import_from_before_answers_were_stored_is_read_without_them(tmp_path, monkeypatch):
    sources = []
    for name, values in (("baseline", "1101"), ("other", "1001")):
        path = tmp_path / f"{name}.csv"
        path.write_text("item,score\n" + "".join(f"{item},{value}\n" for item, value in enumerate(values)))
        sources.append(SourceFile(path, name))
    with monkeypatch.context() as patch:
        patch.setitem(rows.SCHEMAS, "scores", OLDER_SCORES_SCHEMA)
        import_files(sources, tmp_path / "old", Declarations("sums", "higher"))
    assert not check_folder(tmp_path / "old").problems
    metrics = build_report(tmp_path / "old").variants[0].metrics
    assert metrics["sums_right_to_wrong"].value == 0.25
    assert "sums_cut" not in metrics


def test_every_column_that_was_added_is_among_the_newer_ones():
    """The first version's columns, as runs on disk have them."""
    assert TOKENS_SCHEMAS[1].names == [
        "variant", "backend", "corpus", "window", "position", "token", "nll", "kl_nats", "reverse_kl_nats",
        "kl_abs_modelopt", "top1_agreement", "delta_p", "entropy_nats", "kernel_kl_nats",
    ]  # fmt: skip
