"""The command as a user types it on a fresh machine: alias, texts and questions all from the hub, in one process.

The process reads `HF_ENDPOINT` as the hub's own libraries do; nothing in it is replaced.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.fixtures.bench import other_text, text
from tests.fixtures.hub import COMMIT, FakeHub, serve
from tests.fixtures.hub_data import data_sets, sharded_model

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
FLAGS = {
    "--model": "llama-3.2-1b", "--methods": "rtn:g32,awq:g32", "--corpus": "wikitext2", "--max-windows": "1",
    "--window": "64", "--stride": "64", "--calibration": "cnn_dailymail", "--calibration-samples": "2",
    "--calibration-length": "32", "--mmlu-dir": "hub", "--subjects": "astronomy", "--threads": "1",
}  # fmt: skip
CHILD = """
import json, sys
from qeval.cli.app import run
from qeval.tasks.corpus import load_calibration, load_corpus
code = run(sys.argv[1:])
scored = {name: load_corpus(name).text for name in ("wikitext2", "wikitext2-raw", "c4")}
seen = {name: load_calibration(name).text for name in ("wikitext2", "pile-val", "cnn_dailymail")}
print(json.dumps({"code": code, "scored": scored, "seen": seen}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return FakeHub({LLAMA: sharded_model(tmp_path_factory.mktemp("model"))}, data_sets())


def test_an_alias_and_every_text_come_from_the_hub(hub, tmp_path):
    flags = [word for pair in FLAGS.items() for word in pair]
    with serve(hub) as url:
        found = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "QEVAL_HOME": str(tmp_path / "home")}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-c", CHILD, "compare", *flags, "--out", str(tmp_path / "out")]
        done = subprocess.run(command, env=kept | found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, done.stderr
    assert f"{LLAMA} at commit {COMMIT[:12]}" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"]["revision"] == COMMIT
    assert [variant["name"] for variant in report["variants"]] == ["rtn:g32", "awq:g32"]
    assert [(task["record"]["source"], task["record"]["items"]) for task in report["tasks"]] == [("hub", 4)]
    scored, seen = text(30).splitlines(), "\n\n".join(other_text(60).splitlines())
    assert told["seen"] == {"wikitext2": seen, "pile-val": seen, "cnn_dailymail": seen}
    assert told["scored"] == {
        "wikitext2": "\n\n".join(["", " = A = \n", *scored]),
        "wikitext2-raw": "".join([" \n", " = A = \n", *scored]),
        "c4": "\n\n".join(scored),
    }
