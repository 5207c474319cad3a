"""The workflow in configs/ci, its steps run one after the other as GitHub's runner would, on a tiny model."""

import os
import subprocess
import sys

import pytest
import yaml

from qeval.paths import shipped
from tests.fixtures.bench import Bench

WORKFLOW = yaml.safe_load(shipped("configs/ci/qeval-gate.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step["run"] for step in WORKFLOW["jobs"]["gate"]["steps"] if "run" in step}
POLICY = "name: tiny\nrules:\n  - {metric: kl_nats, at_most: %s nats}\n  - {metric: mmlu_flips, at_most: 100 %%}\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkout: a `qeval` on the path (what 'Install' makes), a model, a text, questions, two policies."""
    folder = tmp_path_factory.mktemp("ci")
    bench = Bench(folder)
    program = folder / "bin" / "qeval"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from qeval.cli.app import main; main()" "$@"\n')
    program.chmod(0o755)
    (folder / "loose.yaml").write_text(POLICY % 50)
    (folder / "tight.yaml").write_text(POLICY % 1e-12)
    assert step(folder, "Compare", MODEL=str(bench.model), COMPARE_FLAGS=flags(bench)).returncode == 0
    return folder


def flags(bench):
    left_out = dict.fromkeys(("model", "methods", "out"))
    return " ".join(bench.arguments(**left_out))


def step(folder, name, **changed):
    """One step as the runner does it: the workflow's environment, `bash -e`, the checkout as folder."""
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "QEVAL_HOME": str(folder / "home")}
    summary = {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "PYTHONPATH": os.pathsep.join(sys.path)}
    values = {**WORKFLOW["env"], "METHODS": "rtn:g32", "VARIANT": "rtn:g32", **changed}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]]
    environment = os.environ | own | summary | values
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_workflow_has_these_steps_and_no_others():
    assert list(STEPS) == ["Install", "Compare", "Gate"]


def test_a_run_within_its_margins_lets_the_job_pass(workplace):
    done = step(workplace, "Gate", POLICY="loose.yaml")
    assert done.returncode == 0, done.stderr
    assert "tiny: pass" in done.stdout
    assert (workplace / "gate.xml").exists()


def test_a_run_over_its_margins_stops_the_job_and_says_why(workplace):
    done = step(workplace, "Gate", POLICY="tight.yaml")
    assert done.returncode == 1, done.stderr
    assert "qeval gate `tiny`: fail" in (workplace / "summary.md").read_text()
    assert "over 1e-12" in (workplace / "gate.md").read_text()


def test_a_policy_that_is_not_there_stops_the_job(workplace):
    assert step(workplace, "Gate", POLICY="nowhere.yaml").returncode == 2


def test_the_step_imports_no_torch(workplace):
    code = (
        "import sys\nfrom qeval.cli.app import run_program\n"
        "code = run_program(['gate', 'qeval-run', '--policy', 'loose.yaml', '--variant', 'rtn:g32', '--quiet'])\n"
        "print([name for name in ('torch', 'transformers', 'lm_eval', 'datasets') if name in sys.modules])\n"
        "sys.exit(code)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr
