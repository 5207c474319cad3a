"""Defended: nothing of anybody else's is replaced or removed; places that can't be written are found first."""

import json
import os
import sqlite3
from pathlib import Path
from threading import Thread

import pytest

from qeval.cli.app import run_program
from qeval.compare.arguments import few_workers, size_bytes
from qeval.errors import QevalError, UsageError
from qeval.files.atomic import write_output
from qeval.files.database import open_database
from qeval.paths import check_file, check_place, check_text, with_homes
from qeval.store.ledger import LEDGER_VERSION, join_ledger
from qeval.store.out import check_out, remove_records
from qeval.store.variants import check_free
from tests.fixtures.gate import RELEASE, gate_run
from tests.fixtures.tiny import save_tiny

TEXT = "The quick brown fox and a line. " * 200
FLAGS = ("--methods", "rtn:g32", "--tasks", "kl", "--window", "64", "--stride", "64", "--threads", "1", "--quiet")
PRECIOUS = (
    "states/thesis.txt", "report.md", "report.html", "report.json", "run.json", "texts/windows.parquet", "bench.json",
    "downloads/0123456789abcdef0123456789abcdef.part", "manifest.json", "measured.json", "sweep.json",
)  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """A folder of somebody's that looks like a run's."""
    folder = tmp_path / "project"
    for name in PRECIOUS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.execute("create table invoices(amount)")
    return folder


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    (tmp_path / "t.txt").write_text(TEXT)
    return save_tiny(tmp_path / "m")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capfd, *command):
    assert run_program([*map(str, command)]) == 2
    heard = capfd.readouterr().err
    assert heard.count("\n") == 1
    return heard


@pytest.mark.parametrize("command", ["compare", "bench", "sensitivity", "sweep"])
def test_results_do_not_go_where_others_keep_things(project, model, tmp_path, capfd, command):
    before = contents(project)
    flags = ["--models" if command == "sweep" else "--model", model, "--threads", "1", "--out", project]
    corpus = ["--corpus", tmp_path / "t.txt"] if command in ("compare", "bench", "sweep") else []
    assert "holds things that qeval did not write" in refused(capfd, command, *flags, *corpus)
    assert contents(project) == before


def test_a_variant_replaces_no_folder_of_another_kind(project, model, tmp_path, capfd):
    before = contents(project)
    said = refused(capfd, "quantize", "--model", model, "--method", "rtn", "--out", project)
    assert "exists and is no variant" in said
    assert contents(project) == before


def test_a_variant_with_something_beside_it_is_not_replaced(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format_version": 1, "bits_per_weight": 4}')
    check_free(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt beside a variant"):
        check_free(folder)


@pytest.mark.parametrize("name", PRECIOUS)
def test_one_file_of_a_record_s_name_makes_no_run(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(UsageError, match="did not write"):
        check_out(tmp_path, "the report")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", '{\n "run_version": 2,\n "command"'),
        ("bench.json", '{\n "bench_version": 1}'),
        ("measured.json", '{"key": "a", "kl'),
        (f"rows/tokens/{'0' * 32}-{'1' * 16}.parquet", "torn"),
        ("unfinished/01234567-12-34.json", "{}"),
        (".run.json.q-01234567-12-34.abcdefgh", "temporary"),
    ],
)
def test_a_run_that_was_begun_goes_on(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    check_out(tmp_path, "the report")


def test_new_and_empty_folders_are_taken(tmp_path):
    check_out(tmp_path, "the report")
    check_out(tmp_path / "new" / "er", "the report")
    assert not (tmp_path / "new").exists()


def test_a_ledger_makes_a_run_and_another_database_does_not(tmp_path):
    with join_ledger(tmp_path / "a", "s", "c", pytest.fail, waiting=pytest.fail):
        check_out(tmp_path / "a", "the report")
    (tmp_path / "b").mkdir()
    with sqlite3.connect(tmp_path / "b" / "ledger.sqlite") as database:
        database.execute("create table invoices(amount)")
    with pytest.raises(UsageError, match="did not write"):
        check_out(tmp_path / "b", "the report")
    with pytest.raises(QevalError, match="a database of something else"):
        open_database(tmp_path / "b" / "ledger.sqlite", "CREATE TABLE owners(id)", LEDGER_VERSION, pytest.fail)
    with sqlite3.connect(tmp_path / "b" / "ledger.sqlite") as database:
        assert database.execute("select name from sqlite_master").fetchall() == [("invoices",)]


def test_what_is_no_record_stays_in_a_runs_own_folders(tmp_path):
    states = tmp_path / "states"
    (states / "k").mkdir(parents=True)
    record = f"{'0' * 32}-{'1' * 16}.safetensors"
    for path in (states / record, states / "k" / record, states / "thesis.txt"):
        path.write_text("x")
    remove_records(states)
    assert [path.name for path in states.rglob("*")] == ["thesis.txt"]
    (states / "thesis.txt").unlink()
    remove_records(states)
    assert not states.exists()


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "r.md").write_text("old")
    (tmp_path / "link.md").symlink_to("real/r.md")
    write_output(tmp_path / "link.md", "new")
    assert (tmp_path / "link.md").is_symlink()
    assert (tmp_path / "real" / "r.md").read_text() == "new"
    (tmp_path / "dangling.md").symlink_to("real/n.md")
    write_output(tmp_path / "dangling.md", "new")
    assert (tmp_path / "real" / "n.md").read_text() == "new"


def test_a_file_of_two_names_keeps_both(tmp_path):
    (tmp_path / "a").write_text("something longer than what follows")
    os.link(tmp_path / "a", tmp_path / "b")
    write_output(tmp_path / "a", "new")
    assert (tmp_path / "b").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    heard: list[str] = []
    reader = Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_output(tmp_path / "pipe", "through")
    reader.join(10)
    assert heard == ["through"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_verdict_goes_to_devices_and_links(tmp_path, capfd):
    out = gate_run(tmp_path)
    (tmp_path / "link.xml").symlink_to(tmp_path / "real.xml")
    code = run_program(
        ["gate", str(out), "--policy", RELEASE, "--markdown", "/dev/null", "--junit", str(tmp_path / "link.xml")]
    )
    assert code in (0, 1, 4)
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "link.xml").is_symlink()
    assert (tmp_path / "real.xml").read_text().startswith("<?xml")


@pytest.mark.parametrize("flag", ["--junit", "--markdown"])
@pytest.mark.parametrize("place", ["", "file/x.md", "run"])
def test_a_verdict_that_can_t_be_written_is_told_first(tmp_path, capfd, flag, place):
    out = gate_run(tmp_path)
    (tmp_path / "file").write_text("x")
    assert flag in refused(capfd, "gate", out, "--policy", RELEASE, flag, tmp_path / place)


def test_a_step_summary_that_can_t_be_written_is_told_first(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    assert "$GITHUB_STEP_SUMMARY" in refused(capfd, "gate", gate_run(tmp_path), "--policy", RELEASE)


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder in which nothing can be made: root may write anywhere, so the system's answer is stood in for."""
    folder = tmp_path / "locked"
    folder.mkdir()
    monkeypatch.setattr("qeval.paths._is_writable", lambda place: not place.resolve().is_relative_to(folder.resolve()))
    return folder


@pytest.mark.parametrize("command", ["quantize", "export", "compare", "bench", "sensitivity", "sweep"])
def test_a_read_only_place_is_told_before_a_model_is_loaded(locked, model, tmp_path, capfd, monkeypatch, command):
    monkeypatch.setattr("qeval.models.load.load_model", pytest.fail)
    flags = ["--models" if command == "sweep" else "--model", model, "--threads", "1", "--out", locked / "x"]
    flags += ["--method", "rtn"] if command in ("quantize", "export", "sensitivity") else []
    assert "read-only" in refused(capfd, command, *flags)


def test_a_read_only_card_is_told_first(locked, tmp_path, capfd):
    assert "--into" in refused(capfd, "card", gate_run(tmp_path), "--into", locked / "README.md")


def test_a_name_that_no_file_may_have_is_a_sentence(tmp_path, capfd, model):
    with pytest.raises(UsageError, match="can't be used"):
        check_place(tmp_path / ("x" * 300) / "y", "the report")
    with pytest.raises(UsageError, match="can't be used"):
        check_file(tmp_path / "a\0b", "--junit")


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("~/run", "HOME/run"), ("~", "HOME"), ("--out=~/run", "--out=HOME/run"), ("q=~/q", "q=HOME/q"),
        ("~/a,~/b", "HOME/a,HOME/b"), ("wikitext2,~/b.txt", "wikitext2,HOME/b.txt"), ("a~/b", "a~/b"), ("~x", "~x"),
        ("./~/a", "./~/a"), ("org/name", "org/name"),
    ],
)  # fmt: skip
def test_the_home_folder_is_found_wherever_a_path_begins(monkeypatch, word, found):
    monkeypatch.setenv("HOME", "/h/ome")
    assert with_homes([word]) == [found.replace("HOME", "/h/ome")]


def test_the_home_folder_is_found_in_a_command(tmp_path, monkeypatch, capfd, model):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["compare", "--model=~/m", "--corpus=~/t.txt", *FLAGS, "--out=~/run", "--device", "cpu"]
    assert run_program(command) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"].startswith("qeval compare '--model=~/m'")


def test_words_that_are_no_text_are_refused():
    check_text(["a", "Zürich"])
    with pytest.raises(UsageError, match="not UTF-8"):
        check_text(["a\udcff"])


def test_workers_have_a_limit():
    cores = os.cpu_count() or 1
    assert few_workers(4 * cores, on_ray=False) == 4 * cores
    assert few_workers(100, on_ray=True) == 100
    for on_ray, count in ((False, 4 * cores + 1), (True, 10**6)):
        with pytest.raises(UsageError, match="each holds the whole model"):
            few_workers(count, on_ray=on_ray)


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit", "9" * 20],
        ["--limit=" + "9" * 20],
        ["--seed", "9" * 30],
        ["--window", "9" * 25],
        ["--workers", "1000"],
        ["--stream", "--max-memory", "9" * 400 + "GiB"],
        ["--accuracy-level", "²"],
        ["--executor", "ray", "--worker-gpus", "nan"],
        ["--threads", "9" * 9],
    ],
)
def test_numbers_beyond_any_are_refused_in_a_sentence(model, tmp_path, capfd, flags):
    said = refused(capfd, "compare", "--model", model, "--corpus", tmp_path / "t.txt", "--out", tmp_path / "o", *flags)
    assert "--debug" not in said
    assert len(said) < 400


@pytest.mark.parametrize("size", ["9" * 400 + "GiB", "1e400", "nan", "-1GiB", "0"])
def test_sizes_are_numbers(size):
    with pytest.raises(UsageError, match="--max-memory"):
        size_bytes(size)
