"""Means of scores that are right or wrong: their intervals are those of shares."""

import pytest

from qeval.imports.foreign_rows import Declarations, SourceFile
from qeval.imports.import_run import import_files
from qeval.report import build_report


@pytest.mark.parametrize(
    ("answers", "low", "high"),
    [
        # Wilson's interval by hand: (k + z²/2 ± z sqrt(k (n - k) / n + z²/4)) / (n + z²), z = 1.959964
        ("000000", 0.0, 0.3903343),
        ("100000", 0.0300533, 0.5635028),
        ("111111", 0.6096657, 1.0),
    ],
)
def test_a_share_of_right_answers_has_wilsons_interval(tmp_path, answers, low, high):
    sources = []
    for name, values in (("baseline", answers), ("other", "101010")):
        path = tmp_path / f"{name}.csv"
        path.write_text("item,score\n" + "".join(f"{item},{value}\n" for item, value in enumerate(values)))
        sources.append(SourceFile(path, name))
    import_files(sources, tmp_path / "run", Declarations("sums", "higher"))
    found = build_report(tmp_path / "run").baseline.metrics["sums_score"]
    assert found.value == answers.count("1") / 6
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_a_share_of_right_answers_by_subject_stays_between_none_and_all(tmp_path):
    sources = []
    for name in ("baseline", "other"):
        path = tmp_path / f"{name}.csv"
        rows = [f"{item},{int(item < 3)},{'ab'[item // 3]}" for item in range(6)]
        path.write_text("\n".join(["item,score,subject", *rows]) + "\n")
        sources.append(SourceFile(path, name))
    import_files(sources, tmp_path / "run", Declarations("sums", "higher"))
    found = build_report(tmp_path / "run").baseline.metrics["sums_score"]
    assert (found.low, found.value, found.high) == (0.0, 0.5, 1.0)
