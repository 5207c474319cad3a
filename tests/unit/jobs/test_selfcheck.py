"""`qeval selfcheck`: figures within tolerance, out of it and not reached, and the exit codes that follow."""

import json
from collections import Counter

import pytest
import yaml

from qeval.cli.app import run_program
from qeval.config import BASELINE, parse_method
from qeval.errors import UsageError
from qeval.jobs.selfcheck import Where, read_runs, run_selfcheck, selfcheck_exit_code
from qeval.progress import Silent
from qeval.report.conventions import convention_title
from tests.fixtures.bench import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("selfcheck"))


@pytest.fixture(autouse=True)
def home(bench, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(bench.folder / "home"))


def table(bench, *rows, **changed):
    """A table of one run on the bench's text, written beside it."""
    own = {"model": str(bench.model), "corpus": {"file": "corpus.txt"}, "window": 64, "max_windows": 4} | changed
    path = bench.folder / "table.yaml"
    path.write_text(yaml.safe_dump({"runs": [own | {"source": "a page", "trust": "B", "rows": list(rows)}]}))
    return path


def row(name, of, metric, value, **tolerance):
    return {"id": name, "of": of, "metric": metric, "value": value, **(tolerance or {"absolute": 1e-6})}


def checked(bench, path):
    return run_selfcheck(read_runs(path), Where(bench.folder, threads=1), Silent())


@pytest.fixture(scope="module")
def figures(bench):
    """What a comparison of the same text and windows says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        assert bench.compare("--quiet", methods="rtn:g32", tasks="kl,ppl") == 0
    report = bench.report()
    return report["baseline"]["metrics"]["ppl"]["value"], report["variants"][0]["metrics"]["kl_nats"]["value"]


def test_rows_are_within_or_out_of_tolerance_by_what_a_comparison_gives(bench, figures):
    ppl, kl = figures
    path = table(
        bench,
        row("right", BASELINE, "ppl", ppl),
        row("near", BASELINE, "ppl", 1.009 * ppl, relative=0.01),
        row("far", BASELINE, "ppl", 1.02 * ppl, relative=0.01),
        row("kl", "rtn:g32", "kl_nats", kl),
        row("unknown", "rtn:g32", "kl_gnats", 1.0),
    )
    found = {each.id: each for each in checked(bench, path)}
    states = {name: each.status for name, each in found.items()}
    assert states == {"right": "within", "near": "within", "far": "out", "kl": "within", "unknown": "out"}
    assert found["far"].deviation == pytest.approx(-0.02 * ppl)
    assert found["unknown"].reason == "the run has no kl_gnats"
    assert found["kl"].protocol == "corpus-64/64"
    assert selfcheck_exit_code(list(found.values())) == 1
    assert selfcheck_exit_code([found["right"], found["kl"]]) == 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"corpus": {"file": "absent.txt"}}, "absent.txt is in none of"),
        ({"model": "no/such-folder.gguf"}, "no/such-folder.gguf"),
        ({"needs_gpu": True}, "needs a GPU"),
    ],
)
def test_what_is_not_here_is_not_reached_and_is_no_pass(bench, changed, says):
    (found,) = checked(bench, table(bench, row("one", BASELINE, "ppl", 1.0), **changed))
    assert (found.status, found.measured, found.deviation) == ("not reached", None, None)
    assert says in found.reason
    assert selfcheck_exit_code([found]) == 3


def test_the_command_prints_a_table_or_json_and_picks_rows(bench, figures, capfd):
    ppl, _ = figures
    path = table(bench, row("a-right", BASELINE, "ppl", ppl), row("b-wrong", BASELINE, "ppl", 2 * ppl))
    flags = ["--table", str(path), "--data", str(bench.folder), "--threads", "1", "--quiet", "--device", "cpu"]
    assert run_program(["selfcheck", *flags]) == 1
    assert "1 within, 1 out, 0 not reached (exit code 1)" in capfd.readouterr().out
    assert run_program(["selfcheck", *flags, "--rows", "a-*", "--json"]) == 0
    (only,) = json.loads(capfd.readouterr().out)["rows"]
    assert (only["id"], only["status"], only["trust"]) == ("a-right", "within", "B")
    assert run_program(["selfcheck", *flags, "--rows", "c-*"]) == 2
    assert "a-right, b-wrong" in capfd.readouterr().err


def test_a_row_without_one_tolerance_is_refused(bench):
    with pytest.raises(UsageError, match="either absolute or relative"):
        read_runs(table(bench, row("a", BASELINE, "ppl", 1.0, absolute=1, relative=1)))


def test_the_shipped_table_names_each_row_once_and_only_what_there_is():
    rows = [(each, row) for each in read_runs() for row in each.rows]
    assert max(Counter(row.id for _, row in rows).values()) == 1
    for each, figure in rows:
        assert figure.of == BASELINE or parse_method(figure.of)
        assert 0 < figure.tolerance < abs(figure.value)
        if figure.metric.startswith(("ppl_", "word", "byte", "bits")):
            assert each.convention in convention_title(figure.metric)
