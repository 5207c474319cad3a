"""What is defended: a verdict is of the last command that finished, on the weights that lie there now.

Each way stops, replaces or edits something around real comparisons of tiny models; none may leave a false pass.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qeval.cli.app import run_program as program
from qeval.compare import run as comparing
from qeval.files import hashes
from qeval.gate import sequential_run
from qeval.report.run_rows import PairedRun
from qeval.store.attempts import UNFINISHED, attempt, unfinished
from qeval.store.rows import RowStore
from tests.fixtures.tiny import save_tiny
from tests.fixtures.trust import BAD, GOOD, TOKENS, compare, make_bench, make_gate, quantizing


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return make_bench(tmp_path, monkeypatch)


@pytest.fixture
def gate(tmp_path, capfd):
    return make_gate(tmp_path, capfd)


def test_the_good_one_passes_and_the_bad_one_fails(bench, gate):
    for method, code in ((GOOD, 0), (BAD, 1), (GOOD, 0)):
        assert compare(bench, method) == 0
        assert gate(bench.out)[0] == code
        assert not (bench.out / UNFINISHED).exists()


MOMENTS = ["scored_models", "copy_manifests", "keep_texts", "chain_of", "write_run"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_second_command_that_is_stopped_anywhere_leaves_no_verdict(bench, gate, monkeypatch, capfd, moment):
    assert compare(bench, GOOD) == 0
    with monkeypatch.context() as patch:
        patch.setattr(comparing, moment, stop)
        assert compare(bench, BAD) == 130
    code, said = gate(bench.out)
    assert code == 3
    assert "is no finished run: qeval compare" in said
    for words in (["card", bench.out], ["diff", bench.out, bench.out], ["explain", bench.out, "v"]):
        assert program([str(word) for word in words]) == 3
    capfd.readouterr()
    assert program(["verify", str(bench.out), "--sample", "0", "--quiet"]) == 1
    assert "is no finished run" in capfd.readouterr().out
    assert compare(bench, BAD) == 0
    assert gate(bench.out)[0] == 1


def stop(*_, **__):
    raise KeyboardInterrupt


def test_the_index_of_one_run_is_never_read_under_the_record_of_another(bench, gate, monkeypatch):
    assert compare(bench, GOOD) == 0
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "write_run", stop)
        assert compare(bench, BAD) == 130
    shutil.rmtree(bench.out / UNFINISHED)  # as if the mark had been lost
    code, said = gate(bench.out)
    assert code == 3
    assert "is not the index that" in said


def test_the_first_run_that_is_stopped_is_broken_and_not_wrong_use(bench, gate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "write_run", stop)
        assert compare(bench) == 130
    assert gate(bench.out)[0] == 3
    assert compare(bench) == 0
    assert gate(bench.out)[0] == 0
    assert program(["verify", str(bench.out), "--sample", "3", "--quiet"]) == 0


def test_the_same_command_on_another_candidate_that_is_stopped_leaves_no_verdict(bench, gate, monkeypatch):
    candidate = rounded(bench, 127)
    given = ("--variant", f"v={candidate}")
    assert bench.compare("--quiet", *given, methods=None, **TOKENS) == 0
    assert gate(bench.out)[0] == 0
    rounded(bench, 1)
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "write_run", stop)
        assert bench.compare("--quiet", *given, methods=None, **TOKENS) == 130
    assert gate(bench.out)[0] == 3


def rounded(bench, levels):
    """The float model with its matrices rounded to so many levels a side, under one path, size and time."""
    folder = bench.folder / "candidate"
    if not folder.exists():
        shutil.copytree(bench.model, folder)
    tensors = load_file(bench.model / "model.safetensors")
    for name, value in tensors.items():
        if "proj" in name:
            scale = value.float().abs().amax(1, keepdim=True) / levels
            tensors[name] = ((value.float() / scale).round() * scale).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", (1, 1))
    return folder


def test_a_candidate_replaced_under_its_path_size_and_time_is_scored_anew(bench, gate):
    for levels, code in ((127, 0), (1, 1)):
        given = f"v={rounded(bench, levels)}"
        out = bench.folder / f"out-{levels}"
        assert bench.compare("--quiet", "--variant", given, methods=None, out=str(out), **TOKENS) == 0
        assert gate(out)[0] == code


def test_a_baseline_replaced_under_its_path_size_and_time_is_another(bench):
    keys = []
    for seed in (0, 5):
        save_tiny(bench.model, seed=seed, max_position_embeddings=512)
        os.utime(bench.model / "model.safetensors", (1, 1))
        assert compare(bench) == 0
        keys.append(PairedRun(bench.out).record.model.weights_sha256)
    assert keys[0] != keys[1]


@pytest.mark.parametrize("place", [0, -1, 1 << 21])
def test_a_hash_does_not_outlive_the_bytes_where_all_times_agree(tmp_path, monkeypatch, place):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 22))
    status, stat = path.stat(), Path.stat

    def same(self, **more):  # a clock that was set, a coarse one, a copied inode
        return status if self == path else stat(self, **more)

    monkeypatch.setattr(Path, "stat", same)
    calls = []

    def compute():
        calls.append(1)
        return str(len(calls))

    assert [hashes.cached_hash("file", [path], compute) for _ in range(2)] == ["1", "1"]
    with path.open("r+b") as file:
        file.seek(place % (1 << 22))
        file.write(b"x" * min(1 << 16, (1 << 22) - place % (1 << 22)))
    assert hashes.cached_hash("file", [path], compute) == "2"


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "weights"
    path.write_bytes(b"1")

    def compute():
        path.write_bytes(b"2")
        return "of neither"

    hashes.cached_hash("file", [path], compute)
    assert not list((tmp_path / "home").rglob("*.json"))


def other_weights(folder):
    save_tiny(folder, seed=5, max_position_embeddings=512)


def other_configuration(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.5}))


@pytest.mark.parametrize("change", [other_weights, other_configuration])
def test_a_model_that_is_replaced_while_it_is_scored_leaves_no_run(bench, gate, monkeypatch, capfd, change):
    original = comparing.score_all

    def replaced(*given):
        original(*given)
        change(bench.model)

    monkeypatch.setattr(comparing, "score_all", replaced)
    assert compare(bench) == 3
    assert "were changed while they were scored" in capfd.readouterr().err
    assert gate(bench.out)[0] == 3


def nan_baseline(folder):
    """Finite weights whose products are not."""
    save_tiny(folder, dtype=torch.float32, max_position_embeddings=512)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(1e25)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def silent_baseline(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros_like(tensors["model.norm.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [nan_baseline, silent_baseline])
@pytest.mark.parametrize("tasks", ["kl", "ppl", "mmlu"])
def test_a_baseline_that_is_no_model_ends_the_comparison(bench, gate, capfd, damage, tasks):
    damage(bench.model)
    code = compare(bench, tasks=tasks, mmlu_dir=str(bench.mmlu))
    err = capfd.readouterr().err
    if code == 2:  # some processors' kernels overflow on the first tokens, so loading refuses the model
        assert "gives logits that are not finite" in err
        return
    assert "Nothing can be compared with this baseline" in err or "logits are not finite" in err
    assert code == 3
    assert gate(bench.out)[0] == 3


def test_a_live_gate_that_is_stopped_between_two_looks_leaves_no_run(bench, gate, tmp_path, monkeypatch):
    bench.corpus.write_text("".join(f"Line {i}: {i * i % 97} and {i * 7 % 31} or {i * 3 % 53}.\n" for i in range(200)))
    path = tmp_path / "live.yaml"
    path.write_text(json.dumps({"name": "p", "rules": [{"metric": "kl_nats", "at_most": "0.0001 nats"}]}))
    looked = []
    original = sequential_run.look

    def look(*given):
        looked.append(1)
        if len(looked) > 1:
            raise KeyboardInterrupt
        return tuple(rule.__class__(**{**vars(rule), "outcome": "inconclusive"}) for rule in original(*given))

    flags = ["--corpus", str(bench.corpus), "--window", "32", "--stride", "32", "--threads", "1", "--quiet"]
    words = ["gate", "--model", str(bench.model), "--method", GOOD, "--policy", str(path), *flags]
    with monkeypatch.context() as patch:
        patch.setattr(sequential_run, "look", look)
        assert program([*words, "--out", str(bench.out)]) == 130
    assert len(looked) == 2
    assert gate(bench.out)[0] == 3
    assert program([*words, "--out", str(bench.out)]) in (1, 4)
    assert gate(bench.out)[0] != 3


def judged_live(bench, tmp_path, capfd, *, window, stride):
    """Return the verdict of a live gate on the bench's corpus."""
    path = tmp_path / "live.yaml"
    path.write_text(json.dumps({"name": "p", "rules": [{"metric": "kl_nats", "at_most": "0.05 nats"}]}))
    windows = ["--window", str(window), "--stride", str(stride)]
    flags = ["--corpus", str(bench.corpus), *windows, "--threads", "1", "--quiet", "--json"]
    capfd.readouterr()
    words = ["gate", "--model", str(bench.model), "--method", GOOD, "--policy", str(path), *flags]
    program([*words, "--out", str(bench.out)])
    return json.loads(capfd.readouterr().out)


def test_repeated_windows_and_questions_are_not_drawn_by_a_live_gate(bench, tmp_path, capfd):
    line = "The cat sat on the mat and looked at the rain all day long, ok.\n"
    bench.corpus.write_text(line * 40 + "".join(f"Line {i}: {i * i % 97} saw {i * 7 % 31}!\n" for i in range(100)))
    verdict = judged_live(bench, tmp_path, capfd, window=64, stride=64)
    assert "39 windows hold text that stands in others already; they are not drawn." in verdict["notes"]
    seen = RowStore(bench.out).read("tokens")
    assert len([w for w in set(seen["window"].to_pylist()) if w < 40]) <= 1


def test_a_live_gate_with_overlapping_windows_draws_whole_stretches(bench, tmp_path, capfd):
    bench.corpus.write_text("".join(f"Line {i}: {i * i % 97} saw {i * 7 % 31}!\n" for i in range(100)))
    verdict = judged_live(bench, tmp_path, capfd, window=32, stride=8)
    assert any(note.startswith("Windows overlap: ") for note in verdict["notes"])
    drawn = set(RowStore(bench.out).read("tokens")["window"].to_pylist())
    last = max(drawn | {0})
    for window in drawn - {0}:
        together = range(1 + (window - 1) // 4 * 4, 1 + (window - 1) // 4 * 4 + 4)
        assert all(each in drawn or each > last for each in together)


def test_a_mark_of_a_live_process_stays_and_one_of_a_dead_one_goes(tmp_path):
    out = tmp_path / "out"
    with attempt(out, "qeval compare --model x"):
        (found,) = unfinished(out)
        assert found.alive
        dead = found.path.with_name(f"{found.path.stem.split('-')[0]}-{2**22 - 1}-1.json")
        dead.write_text(json.dumps({"command": "qeval compare", "started": "2026"}))
        parent = f"{found.path.stem.split('-')[0]}-1-0.json"
        assert len(unfinished(out)) == 2
        assert parent not in [each.path.name for each in unfinished(out)]
    assert not unfinished(out)
    assert not (out / UNFINISHED).exists()


def test_a_run_is_published_without_places(bench, tmp_path):
    model = bench.folder / "secret user" / "my model"
    shutil.copytree(bench.model, model)
    given = bench.folder / "secret user" / "given"
    assert program(["quantize", *quantizing(bench, GOOD), "--out", str(given)]) == 0
    assert compare(bench, GOOD, "--variant", f"w={given}", model=str(model)) == 0
    assert program(["card", str(bench.out)]) == 0
    for name in ("report.md", "report.html", "report.json", "card/README.md"):
        text = (bench.out / name).read_text()
        assert str(tmp_path) not in text, name
        assert "secret user" not in text, name
        assert str(Path.home()) + "/" not in text, name
        assert "my model" in text, name
    record = json.loads((bench.out / "run.json").read_text())
    assert record["model"]["weights_sha256"] in (bench.out / "card/README.md").read_text()
    assert record["protocol"]["corpus_sha256"] in (bench.out / "card/README.md").read_text()
