"""`qeval compare` from end to end on a tiny model: what it leaves, what it reuses, what it survives."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from qeval.backends.torch import TorchBackend
from qeval.compare import scored_models
from qeval.errors import QevalError
from qeval.score import jobs
from qeval.score.corpus import window_states
from qeval.store.rows import RowStore
from qeval.store.schema import ITEMS_SCHEMA, TOKENS_SCHEMA
from tests.fixtures.bench import METHODS, Bench
from tests.fixtures.tiny import save_tiny

NAMES = METHODS.split(",")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench on which all three methods were compared; its cache is its own. Tests only read it."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        patch.setattr("qeval.score.corpus._SHARD_TOKENS", 128)
        bench = Bench(folder)
        assert bench.compare("--quiet") == 0
    return bench


@pytest.fixture(autouse=True)
def home(place, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))
    monkeypatch.setattr("qeval.score.corpus._SHARD_TOKENS", 128)


@pytest.fixture
def opened(monkeypatch):
    """How often the baseline (None) and each variant were opened to compute with, by the variant's key."""
    counts = Counter()
    original = TorchBackend.open

    def spy(self, target):
        counts[target and target.folder.name] += 1
        return original(self, target)

    monkeypatch.setattr(TorchBackend, "open", spy)
    return counts


def times(out):
    return {path: path.stat().st_mtime_ns for path in (out / "rows").rglob("*.parquet")}


def rows(out, kind, variant=None):
    table = RowStore(out).read(kind)
    found = [row for row in table.to_pylist() if variant in (None, row["variant"])]
    order = ("variant", "window", "position") if kind == "tokens" else ("variant", "subject", "item")
    return sorted(found, key=lambda row: tuple(row[name] for name in order))


def unnamed(found):
    return [{key: value for key, value in row.items() if key != "variant"} for row in found]


def test_the_report_and_the_plots_are_there(place):
    for name in ("report.md", "report.html", "report.json", "run.json"):
        assert (place.out / name).stat().st_size > 0
    plots = {path.suffix for path in (place.out / "plots").iterdir()}
    assert plots == {".png", ".svg"}


def test_rows_hold_every_position_and_question_of_every_variant(place):
    tokens, items = RowStore(place.out).read("tokens"), RowStore(place.out).read("items")
    assert tokens.schema.names == TOKENS_SCHEMA.names
    assert items.schema.names == ITEMS_SCHEMA.names
    assert Counter(tokens["variant"].to_pylist()) == dict.fromkeys(["baseline", *NAMES], 4 * 64)
    assert Counter(items["variant"].to_pylist()) == dict.fromkeys(["baseline", *NAMES], 8)
    assert sum(row["nll"] is not None for row in rows(place.out, "tokens", "baseline")) == 4 * 63
    assert all(row["kl_nats"] is None for row in rows(place.out, "tokens", "baseline"))
    for path in (place.out / "rows").rglob("*.parquet"):
        assert pq.read_schema(path).names in (TOKENS_SCHEMA.names, ITEMS_SCHEMA.names)


def test_report_json_tells_of_every_variant_in_order(place):
    report = place.report()
    assert {"schema_version", "model", "baseline", "variants", "provenance"} <= set(report)
    assert [variant["name"] for variant in report["variants"]] == NAMES
    for variant in report["variants"]:
        kl = variant["metrics"]["kl_nats"]
        mean = [row["kl_nats"] for row in rows(place.out, "tokens", variant["name"])]
        assert kl["value"] == pytest.approx(sum(mean) / len(mean), rel=1e-9)
        assert 0.01 < kl["low"] < kl["value"] < kl["high"] < 1
        assert (kl["unit"], kl["better"], kl["n"]) == ("nats", "lower", 256)
        assert {"ppl", "top1_agreement", "mmlu_acc"} <= set(variant["metrics"])
        assert 4 < variant["bits_per_weight"] < 8
        assert variant["size_bytes"] < report["baseline"]["size_bytes"]


def test_the_command_is_kept_as_it_was_given(place):
    assert json.loads((place.out / "run.json").read_text())["command"].startswith("qeval compare --model")


def test_a_second_run_computes_nothing_and_prints_what_report_json_holds(place, opened, capfd):
    before, rows_before = times(place.out), rows(place.out, "tokens")
    assert place.compare("--json") == 0
    assert opened == {}
    assert times(place.out) == before
    assert rows(place.out, "tokens") == rows_before
    heard = capfd.readouterr()
    assert json.loads(heard.out) == place.report()
    assert "warning" not in heard.err
    for told in ("rtn:g32, awq:g32, mixed-rtn:g32", "4 of 10 windows, 256 tokens", "8 in 2 subjects", "GiB"):
        assert told in heard.err


def test_adding_a_method_runs_it_alone(place, opened):
    before, first = times(place.out), rows(place.out, "tokens")
    assert place.compare("--quiet", methods=f"{METHODS},rtn:int8-channel") == 0
    (key,) = opened
    assert key is not None
    assert before.items() <= times(place.out).items()
    assert len(times(place.out)) == len(before) + 2 + 2
    assert [row for row in rows(place.out, "tokens") if row["variant"] != "rtn:int8-channel"] == first
    assert [variant["name"] for variant in place.report()["variants"]] == [*NAMES, "rtn:int8-channel"]
    assert place.compare("--quiet") == 0
    assert [variant["name"] for variant in place.report()["variants"]] == NAMES
    assert rows(place.out, "tokens") == first


def test_the_baseline_is_run_once_for_all_reports(place, monkeypatch, tmp_path):
    calls = []
    for module in (jobs, scored_models):
        monkeypatch.setattr(module, "window_states", lambda *args: calls.append(args) or window_states(*args))
    assert place.compare("--quiet", out=str(tmp_path / "other"), tasks="kl", methods="rtn:g32") == 0
    assert len(calls) == 2  # the variant's two shards
    for name in ("baseline", "rtn:g32"):
        assert rows(tmp_path / "other", "tokens", name) == rows(place.out, "tokens", name)


@pytest.mark.parametrize("tokens", ["1", "100", "100000"])
def test_numbers_do_not_depend_on_batches(place, tmp_path, monkeypatch, tokens):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    assert place.compare("--quiet", out=str(tmp_path / "out"), methods="rtn:g32", batch_tokens=tokens) == 0
    for kind, column in (("tokens", "kl_nats"), ("tokens", "nll"), ("items", "choice_loglikelihoods")):
        for name in ("baseline", "rtn:g32"):
            expected = [row[column] for row in rows(place.out, kind, name)]
            found = [row[column] for row in rows(tmp_path / "out", kind, name)]
            for one, other in zip(expected, found, strict=True):
                assert one == (None if other is None else pytest.approx(other, abs=1e-5))


@pytest.mark.parametrize("method", NAMES)
def test_a_variant_made_by_quantize_gives_the_rows_of_its_method(place, tmp_path, method, monkeypatch):
    folder = tmp_path / "variant"
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))  # nothing to be had from the cache
    assert place.quantize(method, folder) == 0
    out = tmp_path / "out"
    assert place.compare("--quiet", "--variant", f"mine={folder}", out=str(out), methods=None) == 0
    for kind in ("tokens", "items"):
        assert unnamed(rows(out, kind, "mine")) == unnamed(rows(place.out, kind, method))
    (variant,) = place.report(out)["variants"]
    assert (variant["name"], variant["method"]) == ("mine", method.partition(":")[0])


def test_a_variant_of_other_weights_is_refused(place, tmp_path, capfd):
    other, folder = save_tiny(tmp_path / "other", seed=1), tmp_path / "variant"
    assert place.quantize("rtn:g32", folder, model=str(other)) == 0
    capfd.readouterr()
    assert place.compare("--variant", f"mine={folder}", out=str(tmp_path / "out")) == 2
    assert f"--variant mine={folder} was made from other weights ({other})" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def fail_at(monkeypatch, name, call, error):
    """Let the jobs module's `name` raise `error` at its `call`-th call, once."""
    original, calls = getattr(jobs, name), []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(jobs, name, failing)
    return calls


def test_a_variant_that_fails_leaves_the_others_scored(place, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    fail_at(monkeypatch, "variant_columns", 2, QevalError("The logits [/of] layer 1 are not finite."))
    assert place.compare("--quiet", out=str(out), tasks="kl") == 3
    assert "warning: rtn:g32 failed: The logits [/of] layer 1 are not finite.\n" in capfd.readouterr().err
    record = json.loads((out / "run.json").read_text())
    assert [variant["status"] for variant in record["variants"]] == ["failed", "done", "done"]
    assert {row["variant"] for row in rows(out, "tokens")} == {"baseline", *NAMES[1:]}
    for name in NAMES[1:]:
        assert rows(out, "tokens", name) == rows(place.out, "tokens", name)
    assert "not finite" in (out / "report.md").read_text()


def test_the_baselines_weights_are_back_after_a_failure(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fail_at(monkeypatch, "variant_columns", 2, QevalError("It failed."))
    assert place.compare("--quiet", out=str(out), tasks="kl,mmlu") == 3
    assert rows(out, "items", "baseline") == rows(place.out, "items", "baseline")


@pytest.mark.parametrize(
    ("name", "call", "finished"),
    [
        ("baseline_columns", 2, 1),  # in the baseline's second shard
        ("score_pairs", 2, 2 + 1),  # in its second subject
        ("variant_columns", 2, 4 + 1),  # in the first variant's second shard
        ("score_pairs", 5, 4 + 4 + 2),  # in the second variant's first subject
    ],
)
def test_ctrl_c_keeps_what_is_done(place, tmp_path, monkeypatch, capfd, name, call, finished):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(tmp_path / "home"))
        fail_at(patch, name, call, KeyboardInterrupt())
        assert place.compare("--quiet", out=str(out)) == 130
        heard = capfd.readouterr()
        said = "Interrupted. What is done is kept; the same command goes on from there: qeval compare --model "
        assert heard.err.startswith(said)
        assert heard.err.count("\n") == 1
        kept = times(out)
        assert len(kept) == finished
        assert not [path for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".part"]
        assert place.compare("--quiet", out=str(out)) == 0
    assert kept.items() <= times(out).items()
    assert len(times(out)) == 4 * 4
    for kind in ("tokens", "items"):
        assert rows(out, kind) == rows(place.out, kind)


def test_ctrl_c_while_a_variant_is_made_keeps_those_before_it(place, tmp_path, monkeypatch, capfd):
    out, cache = tmp_path / "out", tmp_path / "home"
    monkeypatch.setenv("QEVAL_HOME", str(cache))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qeval.compare.variants.collect", interrupted)
        assert place.compare("--quiet", out=str(out)) == 130
    (variant,) = (cache / "variants").iterdir()
    before = (variant / "manifest.json").stat().st_mtime_ns
    assert place.compare("--quiet", out=str(out)) == 0
    assert (variant / "manifest.json").stat().st_mtime_ns == before
    assert rows(out, "tokens") == rows(place.out, "tokens")
    assert "warning" not in capfd.readouterr().err
