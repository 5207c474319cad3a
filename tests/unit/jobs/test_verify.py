"""`qeval verify`: what it finds by checksums, what only computing again can find, and when it can't."""

import json
import shutil
import sqlite3

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qeval.backends.stream.session import StreamSession
from qeval.cli.app import run_program
from qeval.identity import digest_file
from qeval.store.ledger import LEDGER
from qeval.store.rows import RowStore
from tests.fixtures.bench import Bench
from tests.fixtures.runs import reseal
from tests.fixtures.tiny import save_tiny

JOBS = 2 * (2 + 2)
"""The baseline's and one variant's shards of windows and subjects of questions."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("verified"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        patch.setattr("qeval.score.corpus._SHARD_TOKENS", 128)
        assert bench.compare("--quiet", methods="rtn:g32") == 0
    return bench


@pytest.fixture
def out(place, tmp_path, monkeypatch):
    """A copy of the finished run, to break; the cache is shared."""
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))
    monkeypatch.setattr("qeval.score.corpus._SHARD_TOKENS", 128)
    return shutil.copytree(place.out, tmp_path / "out")


def verify(out, *more, sample="0"):
    return run_program(["verify", str(out), "--sample", sample, "--quiet", *more])


def found(capfd):
    return json.loads(capfd.readouterr().out)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_everything_comes_out_again_byte_for_byte(out, capfd):
    assert verify(out, "--json", sample="100") == 0
    told = found(capfd)
    assert len(told["derived"]) == JOBS
    assert all(each["identical"] for each in told["derived"])
    assert sum(each["rows"] for each in told["derived"]) == sum(
        RowStore(out).read(kind).num_rows for kind in ("tokens", "items")
    )
    assert told["looked_at"] == [
        f"{JOBS} shards of rows, {JOBS} of them the run's",
        "the texts of windows and questions",
        f"{JOBS} records of the ledger",
        f"the run's record, its index, and the {JOBS + 3} other files that it names",
        "1 variants in the cache",
    ]
    assert not told["problems"]
    assert not told["notes"]


@pytest.mark.parametrize("more", [["--stream", "--max-memory", "32MiB"], ["--workers", "2", "--threads", "2"]])
def test_streamed_runs_and_those_of_workers_come_out_again(place, tmp_path, monkeypatch, capfd, more):
    monkeypatch.setenv("QEVAL_HOME", str(place.folder / "home"))
    out = tmp_path / "other"
    assert place.compare("--quiet", *more, methods="rtn:g32", threads=None, out=str(out)) == 0
    passes = counted(monkeypatch)
    capfd.readouterr()
    assert verify(out, "--json", sample="3") == 0
    told = found(capfd)
    assert [each["identical"] for each in told["derived"]] == [True] * 3
    if "--stream" in more:
        models = {each["name"] for each in told["derived"]} | {"baseline"}
        assert 1 <= passes["sessions"] <= len(models) + 1, "the layers were not read in turn"
        assert passes["passes"] <= passes["sessions"] + 1, "jobs were not run in one pass"
        forge(out, "tokens", "nll", lambda column: pc.add(column, 0.01))
        assert verify(out, sample="100") == 1
        assert "does not come out again" in capfd.readouterr().out


def counted(monkeypatch):
    """How many streamed sessions there were, and passes over the layers."""
    seen = {"sessions": 0, "passes": 0}
    session = StreamSession
    made, ran = session.__init__, session._run

    def init(self, *arguments):
        seen["sessions"] += 1
        made(self, *arguments)

    def run_(self, calls):
        seen["passes"] += 1
        ran(self, calls)

    monkeypatch.setattr(session, "__init__", init)
    monkeypatch.setattr(session, "_run", run_)
    return seen


def test_a_sample_is_drawn_by_the_seed(out, capfd):
    drawn = []
    for seed in ("0", "0", "1"):
        assert verify(out, "--json", "--seed", seed, sample="2") == 0
        drawn.append([each["file"] for each in found(capfd)["derived"]])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 2


def test_what_was_checked_is_said_in_words(out, capfd):
    assert verify(out, sample="1") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"checked: {JOBS} shards of rows, {JOBS} of them the run's"
    assert lines[-2].startswith("derived: ")
    assert lines[-2].endswith(", the same bytes")
    assert lines[-1] == f"{out}: verified (exit code 0)"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("rows/tokens/*.parquet", flip, "is torn or was changed: its checksum does not fit its name."),
        ("rows/items/*.parquet", lambda path: path.unlink(), "was removed."),
        ("rows/index.json", lambda path: path.write_text("{"), "is torn"),
        ("run.json", lambda path: path.write_text("{"), "is torn or of another version"),
        ("texts/windows.parquet", lambda path: path.write_bytes(b"PAR1"), "is missing or torn"),
        (LEDGER, lambda path: path.write_bytes(b"no ledger at all" * 400), "is torn or of another version"),
    ],
)
def test_damage_is_found_and_named(out, capfd, name, damage, said):
    path = sorted(out.glob(name))[0]
    damage(path)
    assert verify(out) == 1
    told = capfd.readouterr().out
    assert f"differs: {path}" in told
    assert said in told


def test_a_ledger_that_holds_something_else_is_found(out, capfd):
    connection = sqlite3.connect(out / LEDGER)
    connection.execute("UPDATE jobs SET sha256 = 'x' WHERE rowid = (SELECT min(rowid) FROM jobs WHERE file NOT NULL)")
    connection.execute("DELETE FROM jobs WHERE rowid = (SELECT max(rowid) FROM jobs WHERE file NOT NULL)")
    connection.commit()
    connection.close()
    assert verify(out) == 1
    told = capfd.readouterr().out
    assert told.count("does not have the sha256 that the ledger holds.") == 1
    assert told.count("is not in the ledger.") == 1


def test_a_run_without_a_ledger_is_no_broken_run(out, capfd):
    (out / LEDGER).unlink()
    assert verify(out) == 0
    assert f"note: There is no {LEDGER}" in capfd.readouterr().out


def forge(out, kind, column, change):
    """Rows that were never computed, under names, an index, a record and a ledger that fit."""
    index = json.loads((out / "rows/index.json").read_text())
    for place, name in enumerate(index[kind]):
        path = out / "rows" / kind / name
        table = pq.ParquetFile(path).read()
        at = table.schema.get_field_index(column)
        table = table.set_column(at, table.schema.field(at), change(table[column]))
        path.unlink()
        pq.write_table(table, path)
        sha256 = digest_file(path)
        renamed = path.with_name(f"{path.stem.partition('-')[0]}-{sha256[:16]}.parquet")
        path.rename(renamed)
        index[kind][place] = renamed.name
        connection = sqlite3.connect(out / LEDGER)
        connection.execute("UPDATE jobs SET file = ?, sha256 = ? WHERE file = ?", (renamed.name, sha256, name))
        connection.commit()
        connection.close()
    (out / "rows/index.json").write_text(json.dumps(index))
    reseal(out)


@pytest.mark.parametrize(("by", "code"), [(1e-3, 1), (1e-6, 0)])
def test_only_computing_again_finds_rows_that_were_never_computed(out, capfd, by, code):
    forge(out, "tokens", "nll", lambda values: pc.add(values, by))
    assert verify(out) == 0
    assert verify(out, sample="100") == code
    told = capfd.readouterr().out
    assert ("does not come out again: computed from scratch it has values up to 0.001 away." in told) == (code == 1)
    if code == 0:
        assert "rows of baseline (tokens), at most 1.0e-06 away, 0 comparisons of equals otherwise" in told


def test_rows_of_other_questions_are_found(out, capfd):
    forge(out, "items", "item", lambda values: pc.add(values, pa.scalar(1, pa.int32())))
    assert verify(out, sample="100") == 1
    assert "computed from scratch it has other rows." in capfd.readouterr().out


def test_other_batches_come_out_within_the_tolerance(out, capfd):
    record = json.loads((out / "run.json").read_text())
    record["settings"]["settings"]["batch_tokens"] = 1
    reseal(out, record)
    assert verify(out, "--json", sample="100") == 0
    told = found(capfd)
    assert max(each["largest_difference"] for each in told["derived"]) < told["tolerance"] == 1e-4


def test_a_run_whose_model_is_another_now_cannot_be_derived(place, out, tmp_path, capfd):
    record = json.loads((out / "run.json").read_text())
    record["settings"]["settings"]["model"]["name"] = str(
        save_tiny(tmp_path / "m", seed=3, max_position_embeddings=512)
    )
    reseal(out, record)
    assert verify(out, sample="1") == 3
    said = "not done: The run can't be made again: the model's weights are no longer what they were."
    assert said in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record | {"settings": None}, "does not say how to make it again"),
        (lambda record: record | {"settings": {"folder": "/"}}, "of another version of qeval"),
        (lambda record: record | {"settings": record["settings"] | {"folder": "/gone"}}, "which is gone"),
    ],
)
def test_a_record_that_cannot_be_followed_is_told(out, capfd, change, said):
    record = json.loads((out / "run.json").read_text())
    reseal(out, change(record))
    assert verify(out, sample="1") == 3
    assert said in capfd.readouterr().out


def test_a_missing_variant_is_made_again(place, out, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    assert verify(out, "--json", sample="100") == 0
    assert all(each["identical"] for each in found(capfd)["derived"])


def test_a_folder_without_a_run_is_wrong_use(tmp_path, capfd):
    assert verify(tmp_path) == 2
    assert "holds no finished rows" in capfd.readouterr().err
