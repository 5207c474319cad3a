"""The command as a user types it on a fresh machine: alias, texts and questions all from the hub, in one process.

The process reads `HF_ENDPOINT` as the hub's own libraries do; nothing in it is replaced.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from qeval.tasks.hub_data import mmlu_subjects
from tests.fixtures.bench import other_text, text
from tests.fixtures.hub import COMMIT, FakeHub, serve
from tests.fixtures.hub_data import data_sets, sharded_model

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
DOWN = "http://127.0.0.1:9"
FLAGS = {"--model": "llama-3.2-1b", "--methods": "rtn:g32,awq:g32", "--threads": "1", "--device": "cpu"}
SMALL = {"--calibration-samples": "2", "--calibration-length": "32", "--subjects": "astronomy", "--limit": "2"}
"""What the few lines of the stand-in's texts allow."""
CHILD = """
import json, sys
from qeval.cli.app import run_program
from qeval.tasks.corpus import load_calibration, load_corpus
code = run_program(sys.argv[1:])
scored = {name: load_corpus(name).text for name in ("wikitext2", "wikitext2-raw", "c4")}
seen = {name: load_calibration(name).text for name in ("wikitext2", "pile-val", "cnn_dailymail")}
print(json.dumps({"code": code, "scored": scored, "seen": seen}))
"""
NOT_HERE = """
import sys
for name in ("torch", "transformers", "lm_eval.api"):
    sys.modules[name] = None
from qeval.cli.app import run_program
sys.exit(run_program(sys.argv[1:]))
"""
"""A refusal comes before any of these is imported: no weight can be read without."""


PROGRAM = "import sys\nfrom qeval.cli.app import run_program\nsys.exit(run_program(sys.argv[1:]))"


class Machine:
    """A user's machine: its caches, and what the program says there."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"

    def environment(self, url, **more):
        own = {"HF_ENDPOINT": url, "HF_HOME": str(self.folder / "hf"), "QEVAL_HOME": str(self.folder / "home")}
        return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own | more

    def run(self, url, flags, *more, code=PROGRAM,
            **environment):  # fmt: skip
        words = [word for pair in flags.items() for word in pair]
        command = [sys.executable, "-c", code, "compare", *words, "--out", str(self.out), *more]
        return subprocess.run(
            command, env=self.environment(url, **environment), capture_output=True, text=True, check=False
        )

    def report(self):
        return json.loads((self.out / "report.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sharded_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def hub(files):
    return FakeHub({LLAMA: files}, data_sets(mmlu_subjects()), token="right")


@pytest.fixture(scope="module")
def full(hub, tmp_path_factory):
    """A machine that has run the command once, with all that it fetched in its caches."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    with serve(hub) as url:
        done = machine.run(url, FLAGS | SMALL)
    assert done.returncode == 0, done.stderr
    return machine


@pytest.fixture
def machine(full, tmp_path):
    """A copy of it, that a test may spoil."""
    shutil.copytree(full.folder, tmp_path / "machine", symlinks=True)
    shutil.rmtree(tmp_path / "machine" / "out")
    return Machine(tmp_path / "machine")


def refusal(done):
    """The one sentence of a run that was refused."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip("\n")


def test_without_a_flag_text_questions_and_calibration_are_the_published_ones(hub, tmp_path):
    """WikiText-2 by its protocol, all of MMLU through the harness's own tasks, and the Pile to calibrate on."""
    machine = Machine(tmp_path)
    with serve(hub) as url:
        small = {name: SMALL[name] for name in ("--calibration-samples", "--calibration-length")}
        done = machine.run(url, FLAGS | small | {"--limit": "1", "--shots": "1"}, code=CHILD)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, done.stderr
    assert f"{LLAMA} at commit {COMMIT[:12]}" in done.stderr
    report = machine.report()
    assert report["model"]["revision"] == COMMIT
    assert [variant["name"] for variant in report["variants"]] == ["rtn:g32", "awq:g32"]
    ((source, subjects, items, title),) = [
        (task["record"]["source"], len(task["record"]["subjects"]), task["record"]["items"], task["record"]["title"])
        for task in report["tasks"]
    ]
    assert (source, subjects, items, title) == ("hub", 57, 57, "MMLU 1-shot")
    protocol, calibration = report["protocol"], report["provenance"]["calibration"]
    assert (protocol["name"], protocol["convention"]) == ("wikitext2-1024/512", "hf-strided")
    assert calibration["source"] == "pile-val"
    assert "Offline texts" not in (machine.out / "report.md").read_text()
    scored, seen = text(30).splitlines(), "\n\n".join(other_text(60).splitlines())
    assert told["seen"] == {"wikitext2": seen, "pile-val": seen, "cnn_dailymail": seen}
    assert told["scored"] == {
        "wikitext2": "\n\n".join(["", " = A = \n", *scored]),
        "wikitext2-raw": "".join([" \n", " = A = \n", *scored]),
        "c4": "\n\n".join(scored),
    }


def test_what_was_fetched_once_needs_no_hub(full, machine):
    """The hub down, and `HF_HUB_OFFLINE`: the same report, and of the first it is told."""
    before = full.report()["variants"][0]["metrics"]
    down = machine.run(DOWN, FLAGS | SMALL)
    assert down.returncode == 0, down.stderr
    told = " ".join(down.stderr.split())
    assert f"warning: {DOWN} can't be reached" in told
    assert "what its caches hold is used, which need not be the newest" in told
    assert f"the cached copy of commit {COMMIT} is used" in told
    assert machine.report()["variants"][0]["metrics"] == before
    shutil.rmtree(machine.out)
    offline = machine.run(DOWN, FLAGS | SMALL, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert "what its caches hold" not in offline.stderr
    assert machine.report()["variants"][0]["metrics"] == before


@pytest.mark.parametrize(
    ("lost", "environment", "says"),
    [
        ("home/texts", {}, f"{DOWN} can't be reached ([Errno 111] Connection refused), and the Pile's validation text "
         "(mit-han-lab/pile-val-backup) is not in its cache: connect, or give --offline (the Python reference and a "
         "sample of questions), --calibration FILE."),
        ("hf/datasets/cais___mmlu", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and MMLU (cais/mmlu) is not in "
         "its cache: unset it, or give --offline (the Python reference and a sample of questions), --mmlu-dir DIR, "
         "--tasks kl,ppl."),
        ("hf/datasets/cais___mmlu", {"HF_DATASETS_OFFLINE": "1"}, "HF_DATASETS_OFFLINE is set, and MMLU (cais/mmlu)"),
    ],
)  # fmt: skip
def test_a_cache_that_lacks_one_data_set_is_told_which(machine, lost, environment, says):
    """WikiText-2 is in the caches of both libraries, and is not named."""
    shutil.rmtree(machine.folder / lost)
    sentence = refusal(machine.run(DOWN, FLAGS | SMALL, code=NOT_HERE, **environment))
    assert sentence.startswith(says)
    assert "WikiText-2" not in sentence
    assert not machine.out.exists()


def test_a_cache_that_lacks_subjects_says_how_many(machine):
    flags = FLAGS | {name: value for name, value in SMALL.items() if name != "--subjects"}
    assert "and 56 subjects of MMLU (cais/mmlu) is not in its cache" in refusal(machine.run(DOWN, flags))


def test_a_folder_without_a_hub_is_one_sentence_at_once_and_runs_offline(files, tmp_path):
    """No hub, no cache: before torch is imported, in a few seconds; then with `--offline`, and the report says so."""
    machine, folder = Machine(tmp_path), tmp_path / "model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    flags = {"--model": str(folder), "--methods": "rtn:g32"}
    start = time.monotonic()
    sentence = refusal(machine.run("https://hub.invalid", flags, code=NOT_HERE))
    assert time.monotonic() - start < 5
    assert sentence.startswith("https://hub.invalid can't be reached (")
    assert sentence.endswith(
        ", and WikiText-2 (Salesforce/wikitext) and MMLU (cais/mmlu) are not in its cache: connect, or give --offline "
        "(the Python reference and a sample of questions), --corpus FILE, --mmlu-dir DIR, --tasks kl,ppl."
    )
    assert not machine.out.exists()
    some = {"--max-windows": "1", "--limit": "1", "--shots": "1", "--threads": "1", "--device": "cpu"}
    done = machine.run("https://hub.invalid", flags | some, "--offline")
    assert done.returncode == 0, done.stderr
    report = machine.report()
    assert (report["protocol"]["name"], report["tasks"][0]["record"]["source"]) == ("pydoc-1024", "mmlu_sample")
    first = (machine.out / "report.md").read_text().splitlines()[2]
    assert first.startswith("**Offline texts: the Python reference instead of WikiText-2 and a sample of questions")
    assert "Offline texts: the Python reference" in (machine.out / "report.html").read_text()


def test_a_hub_that_never_answers_is_given_up_soon(files, tmp_path):
    """A host that takes a connection and says nothing, as a captive network does."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        machine, url = Machine(tmp_path), f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        flags = {"--model": "llama-3.2-1b", "--methods": "rtn", "--tasks": "kl"}
        sentence = refusal(machine.run(url, flags, code=NOT_HERE))
        assert time.monotonic() - start < 15
        assert "WikiText-2 (Salesforce/wikitext) is not in its cache" in sentence
        assert sentence.startswith((f"{url} did not answer within 3 s (HF_", f"{url} can't be reached ("))
        start = time.monotonic()
        sentence = refusal(machine.run(url, flags, code=NOT_HERE, HF_HUB_ETAG_TIMEOUT="1"))
        assert time.monotonic() - start < 15
    assert sentence.startswith((f"{url} did not answer within 1 s", f"{url} can't be reached ("))


def test_offline_asks_nothing_of_the_hub_and_takes_a_cached_model(hub, machine):
    some = {"--max-windows": "1", "--limit": "1", "--shots": "1", "--calibration-samples": "2"}
    with serve(hub) as url:
        before = len(hub.requests)
        done = machine.run(url, FLAGS | some, "--offline")
        assert len(hub.requests) == before
    assert done.returncode == 0, done.stderr
    assert f"does not answer for '{LLAMA}' (--offline is given)" in " ".join(done.stderr.split())
    assert machine.report()["provenance"]["calibration"]["source"] == "pydoc"


def test_offline_with_a_text_of_the_hub_that_is_not_cached_is_refused(machine):
    shutil.rmtree(machine.folder / "home" / "texts")
    sentence = refusal(machine.run(DOWN, FLAGS | {"--corpus": "c4", "--tasks": "kl"}, "--offline", code=NOT_HERE))
    assert sentence == (
        "--offline is given, and C4 (allenai/c4) is not in its cache: leave --offline out, or give --corpus FILE."
    )


@pytest.mark.parametrize(
    ("token", "gated", "says"),
    [
        ("expired", (), "The hub does not take your token, so 'Salesforce/wikitext' can't be fetched: log in again "
         "(`hf auth login`), or correct HF_TOKEN."),
        ("right", (LLAMA,), f"Access to '{LLAMA}' is restricted: accept its licence at"),
        (None, (LLAMA,), f"Access to '{LLAMA}' is restricted: accept its licence at"),
    ],
)  # fmt: skip
def test_a_token_that_is_refused_and_a_model_without_access_are_sentences(files, tmp_path, token, gated, says):
    hub = FakeHub({LLAMA: files}, data_sets(), token="right", gated=frozenset(gated))
    environment = {} if token is None else {"HF_TOKEN": token}
    with serve(hub) as url:
        sentence = refusal(Machine(tmp_path).run(url, FLAGS | {"--tasks": "kl", "--methods": "rtn"}, **environment))
    assert sentence.startswith(says)


def test_a_hub_that_is_broken_is_told_with_its_code(files, tmp_path):
    hub = FakeHub({LLAMA: files}, data_sets())
    hub.answer = lambda *_: (503, {}, b"")  # type: ignore[method-assign]
    with serve(hub) as url:
        sentence = refusal(Machine(tmp_path).run(url, FLAGS | {"--tasks": "kl"}, code=NOT_HERE))
    assert sentence.startswith(f"{url} answers with the error 503, and WikiText-2")
