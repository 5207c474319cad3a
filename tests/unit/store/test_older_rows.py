"""Runs of the version before: their rows lack columns, and are read without them."""

from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.imports.foreign_rows import Declarations, SourceFile
from qeval.imports.import_run import import_files
from qeval.report import build_report
from qeval.store import rows
from qeval.store.check import check_folder
from qeval.store.schema import OLDER_SCORES_SCHEMA, OLDER_TOKENS_SCHEMA
from tests.fixtures.runs import SEVEN, Shape, make_run

SHAPE = Shape(variants=SEVEN[:3], windows=12, length=32)


def test_a_run_from_before_overlap_is_read_without_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(rows.SCHEMAS, "tokens", OLDER_TOKENS_SCHEMA)
        folder = make_run(tmp_path / "old", SHAPE)
    old, new = build_report(folder), build_report(make_run(tmp_path / "new", SHAPE))
    for before, now in zip(old.variants, new.variants, strict=True):
        assert "overlap" not in before.metrics
        assert {name: metric for name, metric in now.metrics.items() if name != "overlap"} == before.metrics
    assert not check_folder(folder).problems
    rules = [{"metric": "overlap", "at_least": "1 %"}]
    verdict = judge(folder, Policy.model_validate({"name": "p", "rules": rules}))
    assert verdict.exit_code == 3
    assert "The run scored no row for overlap." in str(verdict.variants[0])
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
