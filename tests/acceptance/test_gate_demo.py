"""The release gate on the demo model itself: INT8 per channel passes, INT4 RTN fails."""

import json

import pytest

from qeval.cli.app import run_program
from qeval.errors import QevalError
from qeval.models.demo import demo_folder
from qeval.paths import shipped

pytestmark = pytest.mark.slow

POLICY = str(shipped("configs/gates/release.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        demo_folder()
    except QevalError as error:
        pytest.skip(f"the demo model cannot be had: {error}")
    out = tmp_path_factory.mktemp("demo")
    flags = [
        "--methods",
        "rtn,rtn:int8-channel",
        "--max-windows",
        "6",
        "--limit",
        "10",
        "--out",
        str(out),
        "--quiet",
        "--device",
        "cpu",
    ]
    assert run_program(["compare", "--model", "demo", *flags]) == 0
    return out


def judged(folder, variant, capfd):
    capfd.readouterr()
    code = run_program(["gate", str(folder), "--policy", POLICY, "--variant", variant, "--json"])
    return code, json.loads(capfd.readouterr().out)


def test_int8_per_channel_passes(folder, capfd):
    code, found = judged(folder, "rtn:int8-channel", capfd)
    assert (code, found["outcome"]) == (0, "pass"), found["variants"]


def test_int4_rtn_fails(folder, capfd):
    code, found = judged(folder, "rtn", capfd)
    assert (code, found["outcome"]) == (1, "fail"), found["variants"]
