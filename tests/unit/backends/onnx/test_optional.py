"""ONNX Runtime is an extra: without it the program runs, and asking for it says what to install."""

import subprocess
import sys

import pytest

from tests.fixtures.bench import Bench

WITHOUT = """
import sys
for name in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "onnxscript", "ml_dtypes"):
    sys.modules[name] = None
import importlib.metadata as metadata
real = metadata.packages_distributions
metadata.packages_distributions = lambda: {k: v for k, v in real().items() if not k.startswith("onnx")}
import qeval.compare.run
from qeval.cli.app import run_program
sys.exit(run_program(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "compare",
            "--model",
            "{model}",
            "--methods",
            "rtn:g32",
            "--backend",
            "ort",
            "--corpus",
            "{corpus}",
            "--offline",
        ],
        ["export", "--model", "{model}", "--method", "rtn:g32"],
    ],
)
def test_without_the_extra_asking_for_onnx_runtime_says_what_to_install(arguments, tmp_path):
    bench = Bench(tmp_path / "bench")
    (tmp_path / "here").mkdir()
    filled = [word.format(model=bench.model, corpus=bench.corpus) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *filled, *(["--window", "64"] if "--corpus" in arguments else [])],
        capture_output=True,
        text=True,
        cwd=tmp_path / "here",
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "qeval[cpu]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "here").iterdir())
