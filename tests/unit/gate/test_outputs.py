"""A verdict as JSON, JUnit XML and Markdown."""

import json
import xml.etree.ElementTree as ET

import pytest
from junitparser import JUnitXml

from tests.fixtures.gate import DEMO, RELEASE, gate_run, told
from tests.fixtures.runs import make_run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("gate") / "run", DEMO)


def test_json_says_all_of_it(demo, capfd):
    code, out, _ = told(capfd, demo, "--policy", RELEASE, "--variant", "rtn", "--json")
    found = json.loads(out)
    assert (found["exit_code"], found["outcome"], found["policy"], found["schema_version"]) == (
        code,
        "fail",
        "release",
        1,
    )
    assert {"metric", "margin", "unit", "low", "high", "why", "more_rows"} <= set(found["variants"][0]["rules"][0])


def test_junit_has_a_case_a_rule(demo, tmp_path, capfd):
    path = tmp_path / "gate.xml"
    told(capfd, demo, "--policy", RELEASE, "--junit", path)
    suites = {suite.name: suite for suite in JUnitXml.fromfile(str(path))}
    assert (suites["rtn"].tests, suites["rtn"].skipped) == (7, 1)
    assert suites["rtn"].failures >= 3
    assert (suites["rtn:int8-channel"].failures, suites["rtn:int8-channel"].skipped) == (0, 1)
    names = [case.get("name") for case in ET.parse(path).getroot().iter("testcase")]
    assert "kl_nats at most 0.05 nats" in names


def test_junit_tells_broken_and_inconclusive_apart(tmp_path, capfd):
    folder = gate_run(tmp_path, metrics=("kl",), windows=1)
    file = tmp_path / "p.yaml"
    file.write_text(
        "name: p\nrules:\n  - {metric: kl_nats, at_most: 5 nats}\n  - {metric: mmlu_flips, at_most: 4 %}\n"
        "  - {metric: kl_nats, at_most: 5 nats, variants: [none]}\n"
    )
    code, _, _ = told(capfd, folder, "--policy", file, "--junit", tmp_path / "g.xml")
    (suite,) = JUnitXml.fromfile(str(tmp_path / "g.xml"))
    assert (code, suite.errors, suite.failures) == (3, 1, 1)
    assert "no bound from a single one of the windows" in (tmp_path / "g.xml").read_text()


def test_markdown_is_written_and_the_step_summary_is_added_to(demo, tmp_path, capfd, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    told(capfd, demo, "--policy", RELEASE, "--variant", "rtn", "--markdown", tmp_path / "m.md")
    text = (tmp_path / "m.md").read_text()
    assert text.startswith("## ❌ qeval gate `release`: fail")
    assert "| `kl_nats at most 0.05 nats` | ❌ fail | mean KL of" in text
    assert summary.read_text() == f"before\n{text}\n"


def test_quiet_says_the_verdict_alone(demo, capfd):
    assert told(capfd, demo, "--policy", RELEASE, "--variant", "rtn", "--quiet")[1] == "release: fail (exit code 1)\n"
