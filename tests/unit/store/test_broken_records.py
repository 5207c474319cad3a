"""What goes wrong under a run: a full disk, records torn or changed by hand, prompts that don't fit the context."""

import errno
import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from qeval.store.ledger import LEDGER, read_ledger
from qeval.store.rows import RowStore
from tests.fixtures.bench import Bench
from tests.fixtures.tiny import save_tiny

SMALL = {"methods": "rtn:g32", "max_windows": "2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench with one finished comparison, which tests copy."""
    bench = Bench(tmp_path_factory.mktemp("bench"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(bench.folder / "home"))
        assert bench.compare("--quiet", **SMALL) == 0
    return bench


@pytest.fixture
def copied(place, tmp_path, monkeypatch):
    """The report's folder and the cache of the finished comparison, to break."""
    shutil.copytree(place.folder / "home", tmp_path / "home")
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    return shutil.copytree(place.out, tmp_path / "out"), tmp_path / "home"


def all_rows(out):
    return [RowStore(out).read(kind).to_pylist() for kind in ("tokens", "items")]


def changed_by_hand(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAKS = [changed_by_hand, torn]


@pytest.mark.parametrize("damage", BREAKS)
@pytest.mark.parametrize("kind", ["tokens", "items"])
def test_broken_rows_are_named_and_made_again(place, copied, capfd, kind, damage):
    out, _ = copied
    for path in (out / "rows" / kind).iterdir():
        damage(path)
    assert place.compare("--quiet", out=str(out), **SMALL) == 0
    err = capfd.readouterr().err
    for path in (place.out / "rows" / kind).iterdir():
        named = out / "rows" / kind / path.name
        assert (
            f"warning: {named} is torn or was changed: its checksum does not fit its name. It is made again.\n" in err
        )
    assert all_rows(out) == all_rows(place.out)
    assert any("It is made again." in text for text in json.loads((out / "run.json").read_text())["warnings"])


@pytest.mark.parametrize("damage", BREAKS)
def test_broken_states_are_named_and_made_again(place, copied, capfd, damage):
    out, home = copied
    (path,) = (home / "states").rglob("*.safetensors")
    whole = path.read_bytes()
    damage(path)
    shutil.rmtree(out / "rows" / "tokens")
    assert place.compare("--quiet", out=str(out), **SMALL) == 0
    assert f"warning: {path} is torn or was changed" in capfd.readouterr().err
    assert path.read_bytes() == whole
    assert all_rows(out) == all_rows(place.out)


@pytest.mark.parametrize("damage", [*BREAKS, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_a_broken_variant_is_named_and_made_again(place, copied, capfd, name, damage):
    out, home = copied
    (folder,) = (home / "variants").iterdir()
    whole = (folder / "weights.safetensors").read_bytes()
    if name == "manifest.json" and damage is changed_by_hand:
        (folder / name).write_bytes(b"\xff" + (folder / name).read_bytes())
    else:
        damage(folder / name)
    shutil.rmtree(out / "rows")
    assert place.compare("--quiet", out=str(out), **SMALL) == 0
    warning, _report = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert str(folder) in warning
    assert warning.endswith("It is made again.")
    assert (folder / "weights.safetensors").read_bytes() == whole
    assert all_rows(out) == all_rows(place.out)


def test_a_broken_variant_of_the_users_own_is_an_error(place, copied, capfd, tmp_path):
    _, home = copied
    (folder,) = (home / "variants").iterdir()
    changed_by_hand(folder / "weights.safetensors")
    flags = SMALL | {"methods": None, "out": str(tmp_path / "new")}
    assert place.compare("--quiet", "--variant", f"mine={folder}", **flags) == 3
    said = f"{folder / 'weights.safetensors'} is missing, torn or was changed"
    assert capfd.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("name", ["index.json", "../run.json"])
def test_a_broken_index_or_record_is_written_anew(place, copied, name):
    out, _ = copied
    torn(out / "rows" / name)
    assert place.compare("--quiet", out=str(out), **SMALL) == 0
    assert all_rows(out) == all_rows(place.out)


@pytest.mark.parametrize("damage", [torn, Path.unlink, lambda path: path.write_bytes(b"no ledger")])
def test_a_broken_ledger_is_made_again_from_the_records(place, copied, capfd, damage):
    out, _ = copied
    damage(out / LEDGER)
    assert place.compare("--quiet", out=str(out), **SMALL) == 0
    said = f"warning: {out / LEDGER} is torn or of another version ("
    assert (said in capfd.readouterr().err) == (damage is not Path.unlink)
    with read_ledger(out) as ledger, read_ledger(place.out) as whole:
        assert ledger.finished() == whole.finished()
        assert not ledger.attempts()
    assert all_rows(out) == all_rows(place.out)


@contextmanager
def file_size_limit(size):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (2_000, "error: Cannot write OUT/ledger.sqlite: disk I/O error"),
        (70_000, "error: Cannot write HOME/states/"),
    ],
)
def test_a_disk_that_fills_up_is_told_and_leaves_no_half_file(place, tmp_path, monkeypatch, capfd, size, said):
    home, out = tmp_path / "home", tmp_path / "out"
    monkeypatch.setenv("QEVAL_HOME", str(home))
    flags = {"methods": "rtn:g32", "max_windows": "10", "out": str(out)}
    with file_size_limit(size):
        assert place.compare("--quiet", **flags) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(said.replace("HOME", str(home)).replace("OUT", str(out)))
    for path in (*home.rglob("*"), *out.rglob("*")):
        assert not path.name.startswith("."), path
    assert place.compare("--quiet", **flags) == 0
    assert "warning" not in capfd.readouterr().err


def test_rows_that_cannot_be_written_are_one_line(place, copied, monkeypatch, capfd):
    out, _ = copied
    shutil.rmtree(out / "rows")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qeval.store.rows.pq.write_table", full)
        assert place.compare("--quiet", out=str(out), **SMALL) == 3
    err = capfd.readouterr().err
    assert err.startswith(f"error: Cannot write {out / 'rows' / 'tokens'}")
    assert err.endswith(": No space left on device. What was written before it is kept.\n")
    assert place.compare("--quiet", out=str(out), **SMALL) == 0
    assert all_rows(out) == all_rows(place.out)


def test_choices_that_look_like_no_text_stay_text(place):
    (row, *_) = [row for row in all_rows(place.out)[1] if row["subject"] == "astronomy" and row["item"] == 0]
    assert row["prompt_tokens"] > 0
    from transformers import AutoTokenizer

    from qeval.tasks.harness import load_suite

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    suite = load_suite(
        "mmlu", tokenizer, max_length=512, bos="auto", shots=2, limit=1, folder=place.mmlu, subjects=["astronomy"]
    )
    (question,) = suite.questions
    assert "\nA. None\nB. 2.50\nC. x0\nD. NA\nAnswer:" in tokenizer.decode(question.prompt)
    assert len(question.prompt) == row["prompt_tokens"]


def test_shots_that_do_not_fit_are_dropped_and_counted(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    model, out = save_tiny(tmp_path / "model", max_position_embeddings=200), tmp_path / "out"
    assert place.compare("--quiet", model=str(model), out=str(out), **SMALL) == 0
    rows = all_rows(out)[1]
    dropped = {(row["subject"], row["item"]) for row in rows if row["shots"] < 2}
    assert dropped
    assert all(row["prompt_tokens"] <= 200 for row in rows)
    assert json.loads((out / "run.json").read_text())["tasks"][0]["items_with_fewer_shots"] == len(dropped)
    assert "fewer" in (out / "report.md").read_text()


def test_a_question_that_never_fits_is_refused(place, tmp_path, capfd):
    model = save_tiny(tmp_path / "model", max_position_embeddings=100)
    capfd.readouterr()
    assert place.compare("--quiet", model=str(model), out=str(tmp_path / "out"), **SMALL) == 2
    assert "takes more tokens than the model's context of 100." in capfd.readouterr().err
