"""What is defended: what a run's folder, its variants and the cache say is what was computed.

Each way edits something around real comparisons of tiny models and makes the edit hang together; none may pass unseen.
"""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qeval.cli.app import run_program as program
from qeval.identity import digest_file
from qeval.report.run_rows import PairedRun
from qeval.store.seal import has_valid_seal, seal
from qeval.store.variants import read_manifest
from tests.fixtures.runs import reseal
from tests.fixtures.trust import BAD, GOOD, TOKENS, compare, make_bench, make_gate, quantizing


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return make_bench(tmp_path, monkeypatch)


@pytest.fixture
def gate(tmp_path, capfd):
    return make_gate(tmp_path, capfd)


def edited(out, change):
    content = json.loads((out / "run.json").read_text())
    change(content)
    reseal(out, content)


def test_verify_finds_a_whole_forgery_of_a_size(bench, capfd):
    assert compare(bench) == 0

    def smaller(content):
        content["variants"][0]["size_bytes"] //= 4

    edited(bench.out, smaller)
    assert program(["verify", str(bench.out), "--sample", "0", "--quiet"]) == 1
    (manifest,) = (bench.out / "manifests").iterdir()
    content = json.loads(manifest.read_text())
    content["size_bytes"] //= 4
    manifest.write_text(json.dumps(seal(content)))
    edited(bench.out, lambda content: None)
    assert program(["verify", str(bench.out), "--sample", "0", "--quiet"]) == 0  # it hangs together
    capfd.readouterr()
    assert program(["verify", str(bench.out), "--sample", "1", "--quiet"]) == 1  # and is not what the variant is
    assert "gives 'v' another size_bytes than the variant itself has" in capfd.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(baseline_size_bytes=content["baseline_size_bytes"] * 4),
        lambda content: content["model"].update(parameters=1),
        lambda content: content["protocol"].update(stride=1),
        lambda content: content["variants"][0].update(role="floor"),
    ],
)
def test_verify_finds_other_forged_facts(bench, capfd, change):
    assert compare(bench) == 0
    edited(bench.out, change)
    assert program(["verify", str(bench.out), "--sample", "1", "--quiet"]) == 1
    assert "run's record" in capfd.readouterr().out


def test_verify_finds_rows_of_a_good_variant_under_a_bad_ones_name(bench, gate, capfd):
    assert compare(bench, BAD) == 0
    assert compare(bench, GOOD, out=str(bench.folder / "good")) == 0
    mine, theirs = of_variant(bench.out), of_variant(bench.folder / "good")
    for path, donor in zip(mine, theirs, strict=True):
        path.unlink()
        shutil.copy(donor, path)
        renamed = path.with_name(f"{path.stem.partition('-')[0]}-{digest_file(path)[:16]}.parquet")
        index = (bench.out / "rows/index.json").read_text().replace(path.name, renamed.name)
        path.rename(renamed)
        (bench.out / "rows/index.json").write_text(index)
    assert gate(bench.out)[0] == 3
    reseal(bench.out)
    (bench.out / "ledger.sqlite").unlink()
    assert program(["verify", str(bench.out), "--sample", "100", "--quiet"]) == 1
    assert "does not come out again" in capfd.readouterr().out


def of_variant(out):
    paths = [out / "rows/tokens" / name for name in json.loads((out / "rows/index.json").read_text())["tokens"]]
    return [path for path in paths if "baseline" not in pq.read_table(path)["variant"].unique().to_pylist()]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_a_run_whose_manifest_is_gone_or_changed_is_broken(bench, gate, change):
    assert compare(bench) == 0
    (manifest,) = (bench.out / "manifests").iterdir()
    change(manifest)
    code, said = gate(bench.out)
    assert code == 3
    assert str(manifest) in said


def test_a_record_whose_sizes_are_not_its_manifests_is_broken(bench, gate):
    assert compare(bench) == 0
    edited(bench.out, lambda content: content["variants"][0].update(size_bytes=1))
    code, said = gate(bench.out)
    assert code == 3
    assert "gives 'v' size_bytes 1 and its manifest" in said


def test_a_manifest_in_the_cache_with_other_sizes_is_found_and_made_again(bench, capfd):
    assert compare(bench) == 0
    size = PairedRun(bench.out).done[0].size_bytes
    (path,) = (bench.folder / "home/variants").glob("*/manifest.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"size_bytes": 1}))
    capfd.readouterr()
    assert compare(bench) == 0
    assert "was changed: its checksum or its sizes do not fit it. It is made again." in capfd.readouterr().err
    assert PairedRun(bench.out).done[0].size_bytes == size
    path.write_text(json.dumps(content | {"size_bytes": 1, "format_version": 1, "sha256": None}))
    assert compare(bench) == 0
    assert PairedRun(bench.out).done[0].size_bytes == size


def test_a_variant_of_an_older_qeval_is_still_read(bench):
    folder = bench.folder / "older"
    assert program(["quantize", *quantizing(bench, GOOD), "--out", str(folder)]) == 0
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    (folder / "manifest.json").write_text(json.dumps(content | {"format_version": 1}))
    assert read_manifest(folder).sha256 is None
    assert bench.compare("--quiet", "--variant", f"v={folder}", methods=None, **TOKENS) == 0


def test_a_given_variant_that_claims_anothers_key_is_scored_by_its_own_weights(bench, gate):
    good, bad = bench.folder / "good", bench.folder / "bad"
    for folder, method in ((good, GOOD), (bad, BAD)):
        assert program(["quantize", *quantizing(bench, method), "--out", str(folder)]) == 0
    assert bench.compare("--quiet", "--variant", f"v={good}", methods=None, **TOKENS) == 0
    assert gate(bench.out)[0] == 0
    content = json.loads((bad / "manifest.json").read_text())
    content["key"] = read_manifest(good).key
    (bad / "manifest.json").write_text(json.dumps(seal(content)))
    assert bench.compare("--quiet", "--variant", f"v={bad}", methods=None, **TOKENS) == 0
    assert gate(bench.out)[0] == 1


def test_sensitivities_that_were_edited_are_measured_again(bench, capfd):
    flags = {"calibration_samples": "4", "calibration_length": "24", "max_windows": "1", "tasks": "ppl"}
    assert bench.compare("--quiet", **(TOKENS | flags | {"methods": "mixed-rtn:g32-6bpw"})) == 0
    (path,) = (bench.folder / "home/trials").iterdir()
    content = json.loads(path.read_text())
    assert has_valid_seal(content)
    content["kl_nats"] = dict.fromkeys(content["kl_nats"], 0.0)
    edits = [content, {"kl_nats": content["kl_nats"]}, seal(content | {"key": "another"})]
    for edit in edits:
        path.write_text(json.dumps(edit))
        shutil.rmtree(bench.folder / "home/variants")
        capfd.readouterr()
        assert bench.compare("--quiet", **(TOKENS | flags | {"methods": "mixed-rtn:g32-6bpw"})) == 0
        assert "has no checksum that fits it" in " ".join(capfd.readouterr().err.split())
        measured = json.loads(path.read_text())
        assert has_valid_seal(measured)
        assert any(measured["kl_nats"].values())


def test_a_sound_run_that_cannot_be_written_to_verifies(bench, monkeypatch, capfd):
    assert compare(bench) == 0
    access = os.access

    def no_writing(path, mode, **more):
        return access(path, mode, **more) and not (mode & os.W_OK and Path(path) == bench.out)

    monkeypatch.setattr(os, "access", no_writing)
    before = sorted(bench.out.rglob("*"))
    assert program(["verify", str(bench.out), "--sample", "2", "--quiet"]) == 0, capfd.readouterr().out
    assert sorted(bench.out.rglob("*")) == before
