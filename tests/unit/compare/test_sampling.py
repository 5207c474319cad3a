"""`--sampling` from end to end: what rows, report, card and gate say, what it changes, and what is refused."""

import pytest

from qeval.gate.judge import judge
from qeval.gate.policy import Policy
from qeval.report import build_report
from qeval.store.rows import RowStore
from qeval.store.run import read_run
from tests.fixtures.bench import Bench, refusing

FLAGS = {"methods": "rtn:g32", "tasks": "kl", "max_windows": "2", "mmlu_dir": None, "shots": None}
COLUMNS = ("sampling_kl_nats", "outside_nucleus")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run under a sampler lies in `out`, and one without in `plain`."""
    place = Bench(tmp_path_factory.mktemp("sampling"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(place.folder / "home"))
        assert place.compare("--quiet", **FLAGS, sampling="top_p=0.9,temperature=0.7") == 0
        assert place.compare("--quiet", **FLAGS, out=str(place.folder / "plain")) == 0
        yield place


def test_rows_report_and_gate_have_both_numbers(bench):
    rows = RowStore(bench.out).read("tokens").to_pylist()
    compared = [row for row in rows if row["variant"] == "rtn:g32"]
    variant = build_report(bench.out).variants[0]
    for name in COLUMNS:
        values = [row[name] for row in compared]
        assert variant.metrics[name].value == pytest.approx(sum(values) / len(values))
        assert variant.metrics[name].low < variant.metrics[name].value < variant.metrics[name].high
        assert all(row[name] is None for row in rows if row["variant"] == "baseline")
    assert read_run(bench.out).protocol.sampling == "top_p=0.9,temperature=0.7"
    assert "Under a sampler: top_p=0.9,temperature=0.7" in (bench.out / "report.md").read_text(encoding="utf-8")
    rules = [{"metric": "sampling_kl_nats", "at_most": "9 nats"}, {"metric": "outside_nucleus", "at_most": "90 %"}]
    assert judge(bench.out, Policy.model_validate({"name": "p", "rules": rules})).exit_code == 0


def test_without_it_nothing_of_it_is_there_and_the_rest_is_equal(bench):
    plain, under = (RowStore(out).read("tokens").to_pylist() for out in (bench.folder / "plain", bench.out))
    assert all(row[name] is None for row in plain for name in COLUMNS)
    without = [{name: value for name, value in row.items() if name not in COLUMNS} for row in under]
    assert without == [{name: value for name, value in row.items() if name not in COLUMNS} for row in plain]
    assert not set(COLUMNS) & build_report(bench.folder / "plain").variants[0].metrics.keys()
    assert "Under a sampler" not in (bench.folder / "plain" / "report.md").read_text(encoding="utf-8")


def test_a_sampler_without_a_corpus_is_refused(bench, capfd):
    flags = FLAGS | {"tasks": "mmlu", "mmlu_dir": str(bench.mmlu), "sampling": "top_p=0.9"}
    message = refusing(bench, bench.folder / "refused", capfd)(**flags)
    assert "--sampling compares distributions over a corpus" in message
