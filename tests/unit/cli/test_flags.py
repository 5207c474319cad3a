"""The command line is a promise: these flags, these defaults, these exit codes; and `--help` answers at once."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from qeval import __version__
from qeval.cli.app import app, main, run_program
from qeval.cli.commands import COMMANDS
from qeval.cli.compare import compare
from qeval.quant.grid import FLOAT_WORDS

SHARED = {
    "--model": None,
    "--revision": None,
    "--device": "auto",
    "--compute": None,
    "--calibration": None,
    "--calibration-samples": None,
    "--calibration-length": 512,
    "--calibrate-all-experts": False,
    "--offline": False,
    "--budget": None,
    "--importance": "measured",
    "--quantize-head": False,
    "--threads": None,
    "--seed": 0,
    "--out": None,
    "--json": False,
    "--quiet": False,
    "--debug": False,
}
MIXED = ("--budget", "--importance", "--quantize-head")
RUNTIME = {"--ep": "auto", "--exporter": "auto", "--format": "nbits", "--precision": None}
COMPARE = SHARED | {
    "--stream": False,
    "--max-memory": None,
    "--device-map": None,
    **RUNTIME,
    "--accuracy-level": "1",
    "--methods": None,
    "--config": None,
    "--variant": None,
    "--external-parts": "split",
    "--kv-types": None,
    "--backend": "torch",
    "--endpoint-model": None,
    "--endpoint-top": 20,
    "--endpoint-key-variable": "OPENAI_API_KEY",
    "--endpoint-timeout": 120.0,
    "--endpoint-requests": 8,
    "--vllm-python": None,
    "--vllm-dtype": "auto",
    "--vllm-tensor-parallel": 1,
    "--vllm-kv-cache": "auto",
    "--tasks": "kl,ppl,mmlu",
    "--corpus": None,
    "--protocol": None,
    "--convention": None,
    "--window": None,
    "--stride": None,
    "--max-windows": None,
    "--bos": "auto",
    "--sampling": None,
    "--mmlu-dir": None,
    "--subjects": None,
    "--limit": None,
    "--shots": 5,
    "--apply-chat-template": False,
    "--fewshot-as-multiturn": "true",
    "--system-instruction": None,
    "--drift-prompts": 32,
    "--drift-prompt-tokens": 64,
    "--drift-tokens": 64,
    "--needle-lengths": "1024,4096",
    "--needle-depths": 5,
    "--needle-haystacks": 8,
    "--prompts": None,
    "--template": None,
    "--chat-tokens": 256,
    "--chat-temperature": 0.0,
    "--reasoning-questions": None,
    "--reasoning-tokens": 1024,
    "--grammar-calls": 4,
    "--batch-tokens": None,
    "--workers": 0,
    "--executor": "local",
    "--worker-gpus": None,
    "--split": False,
}
QUANTIZE = SHARED | {"--method": None, "--stream": False, "--max-memory": None, "--device-map": None}
_TORCH_ONLY = ("--compute", "--stream", "--max-memory", "--device-map")
EXPORT = {name: value for name, value in QUANTIZE.items() if name not in _TORCH_ONLY} | {
    **RUNTIME,
    "--accuracy-level": 1,
    "--to": "onnx",
    "--run": None,
    "--compute": None,
}
BENCH = {name: value for name, value in SHARED.items() if name != "--compute"} | {
    "--methods": "fp32,rtn",
    "--variant": None,
    "--engines": "onnxruntime,pytorch-eager",
    "--batch": "1",
    "--prompt": "16,256,1024",
    "--generate": None,
    "--ep": "auto",
    "--accuracy-level": 4,
    "--corpus": "pydoc",
    "--time-budget": 540.0,
    "--repeats": 30,
    "--quality": None,
    "--reference": None,
    "--base": None,
}
READERS = {
    "explain": {"run": None, "variant": None, "--limit": 20, "--json": False, "--debug": False},
    "card": {"run": None, "--variant": None, "--into": None, "--debug": False},
    "verify": {
        "run": None,
        "--sample": 4,
        "--seed": 0,
        "--json": False,
        "--quiet": False,
        "--debug": False,
    },
    "models": {
        "--check": False,
        "--all": False,
        "--family": None,
        "--json": False,
        "--quiet": False,
        "--debug": False,
    },
    "doctor": {"--model": None, "--revision": None, "--offline": False, "--json": False, "--debug": False},
    "import": {
        "files": None,
        "--out": None,
        "--baseline": None,
        "--task": None,
        "--repeats": False,
        "--higher-is-better": None,
        "--json": False,
        "--quiet": False,
        "--debug": False,
    },
    "advise": {
        "run": None,
        "variant": None,
        "--corpus": None,
        "--max-windows": 16,
        "--offline": False,
        "--threads": None,
        "--out": None,
        "--json": False,
        "--quiet": False,
        "--debug": False,
    },
    "board": {"runs": None, "--out": None, "--accept": False, "--export": None, "--debug": False},
    "diff": {"run_a": None, "run_b": None, "--variant": None, "--json": False, "--debug": False},
}
"""Commands that read finished runs or rows: their arguments by name, then their flags."""
NEEDED = {"import": {"--out"}, "board": {"--out"}}
"""Flags of theirs that have no default."""
OPTIONAL = {"board": {"runs"}, "advise": {"variant"}}
"""Arguments of theirs that may be left out."""

SELFCHECK = {
    "--rows": None,
    "--table": None,
    "--data": None,
    "--mmlu-dir": None,
    "--device": "auto",
    "--threads": None,
    "--json": False,
    "--quiet": False,
    "--debug": False,
}
SENSITIVITY = {name: value for name, value in SHARED.items() if name not in MIXED} | {
    "--method": "rtn",
    "--budgets": None,
    "--formats": None,
    "--measured-samples": 10,
    "--device-map": None,
}
SWEEP = {
    "--models": None,
    "--models-at-once": None,
    "--calibration-seeds": 1,
    "--out": Path("reports/sweep"),
    "--bits": None,
    "--groups": None,
    "--budgets": None,
    "--debug": False,
}
REQUIRED = {
    "compare": {"--model"},
    "bench": {"--model"},
    "sweep": {"--models"},
    "quantize": {"--model", "--method"},
    "export": {"--model", "--method"},
    "selfcheck": set(),
    "sensitivity": {"--model"},
}


def parameters(command):
    return typer.main.get_command(app).commands[command].params


@pytest.mark.parametrize(
    ("command", "frozen"),
    [
        ("compare", COMPARE),
        ("quantize", QUANTIZE),
        ("export", EXPORT),
        ("sweep", SWEEP),
        ("selfcheck", SELFCHECK),
        ("bench", BENCH),
        ("sensitivity", SENSITIVITY),
    ],
)
def test_flags_and_their_defaults_are_frozen(command, frozen):
    found = {p.opts[0]: p for p in parameters(command)}
    assert all(p.param_type_name == "option" for p in found.values())
    assert set(found) == set(frozen)
    assert {name for name, p in found.items() if p.required} == REQUIRED[command]
    optional = {name: p.default for name, p in found.items() if not p.required}
    assert optional == {name: value for name, value in frozen.items() if name in optional}
    assert {name for p in found.values() for name in p.opts[1:] + p.secondary_opts} <= {"--dtype"}


@pytest.mark.parametrize(("command", "frozen"), READERS.items())
def test_arguments_and_flags_of_what_reads_runs_are_frozen(command, frozen):
    found = {p.opts[0]: p for p in parameters(command)}
    assert set(found) == set(frozen)
    needed = {name for name in frozen if not name.startswith("-")} - OPTIONAL.get(command, set())
    needed |= NEEDED.get(command, set())
    assert {name for name, p in found.items() if p.required} == needed
    assert {n: p.default for n, p in found.items() if not p.required} == {
        name: value for name, value in frozen.items() if name not in needed
    }


def test_the_choices_of_a_flag_are_frozen():
    hints = get_type_hints(compare).items()
    found = {name: get_args(kind) for name, kind in hints if get_origin(kind) is Literal}
    assert found == {
        "external_parts": ("split", "all", "weights"),
        "bos": ("auto", "always", "never"),
        "fewshot_as_multiturn": ("true", "false"),
        "exporter": ("auto", "genai", "dynamo"),
        "format": ("nbits", "qdq"),
        "executor": ("local", "ray"),
        "importance": ("measured", "fisher", "positional"),
    }


def test_only_variant_may_be_repeated():
    assert [p.opts[0] for p in parameters("compare") if p.multiple] == ["--variant"]


def test_every_command_and_flag_says_what_it_is_for():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, (name, parameter.opts)
    known = {
        "compare",
        "sweep",
        "bench",
        "quantize",
        "export",
        "explain",
        "gate",
        "import",
        "advise",
        "board",
        "verify",
        "selfcheck",
        "sensitivity",
        "card",
        "diff",
        "doctor",
        "models",
        "methods",
        "tasks",
    }
    assert set(typer.main.get_command(app).commands) == known


HEAVY = ("torch", "transformers", "lm_eval", "matplotlib", "datasets")
PLAIN_HELP = (*HEAVY, "numpy", "pandas", "scipy", "onnx", "pyarrow", "pydantic", "yaml", "sqlite3", "qeval.api")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        ("--help", PLAIN_HELP),
        ("--version", PLAIN_HELP),
        ("compare --help", (*HEAVY, "numpy")),
        ("gate --help", HEAVY),
        ("methods", HEAVY),
        ("tasks", HEAVY),
        ("models", HEAVY),
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(arguments, heavy):
    code = (
        "import sys\n"
        "from qeval.cli.app import run_program\n"
        f"code = run_program({arguments.split()!r})\n"
        f"print('heavy:', [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "heavy: []\n"
    assert done.stdout


def test_the_programs_help_lists_each_command_by_the_first_line_of_its_own():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.name == name
        assert " ".join(command.help.split()).startswith(COMMANDS[name].summary)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["tasks"], 0), (["--version"], 0), (["methods", "--help"], 0), (["tasks", "more"], 2)]
)
def test_a_reader_that_leaves_early_changes_no_exit_code(monkeypatch, capfd, arguments, code):
    """Tables by rich, lines by typer, its help, and an error."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run_program(arguments) == code
    assert (capfd.readouterr().err == "") == (code == 0)


def test_exit_codes_of_what_is_asked_and_what_is_wrong(capfd):
    assert run_program(["--version"]) == 0
    assert capfd.readouterr().out == f"qeval {__version__}\n"
    assert run_program(["compare", "--help"]) == 0
    assert run_program(["methods"]) == 0
    assert capfd.readouterr().err == ""
    assert run_program([]) == 0
    assert "Usage: qeval" in capfd.readouterr().out


def test_methods_lists_every_format_and_range(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_program(["methods"]) == 0
    heard = capfd.readouterr().out.split()
    words = {word.strip(",") for word in heard}
    assert {*FLOAT_WORDS} - {"fp8e5m2", "mxfp6"} <= words
    assert {"fp8e5m2-tensor", "mxfp6-e3m2", "mxfp8-rceil", "full", "half", "signed"} <= words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("compair", "No such command 'compair'"),
        ("compare", "Missing option '--model'"),
        ("compare --model m --methodz rtn", "No such option: --methodz"),
        ("compare --model m --window wide", "Invalid value for '--window'"),
        ("compare --model m --bos often", "Invalid value for '--bos'"),
        ("compare --model m words", "unexpected extra argument"),
        ("compare --model", "'--model' requires an argument"),
    ],
)
def test_what_the_parser_refuses_is_code_2_and_one_line(arguments, said, capfd):
    assert run_program(shlex.split(arguments)) == 2
    heard = capfd.readouterr()
    assert heard.out == ""
    assert heard.err.startswith("error: ")
    assert said in heard.err
    assert heard.err.count("\n") == 1


def test_main_exits_with_the_code_of_run(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--model", "./nowhere"])
    assert stop.value.code == 2
    assert capfd.readouterr().err == "error: The model folder './nowhere' does not exist.\n"


def test_a_failure_that_nobody_foresaw_is_one_line_and_code_3(monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("[/odd] words")

    monkeypatch.setattr("qeval.compare.recipe_choice.load_recipes", fail)
    arguments = shlex.split("compare --model ./m --config c.yaml")
    assert run_program(arguments) == 3
    assert capfd.readouterr().err == "error: RuntimeError: [/odd] words (--debug shows where)\n"
    assert run_program([*arguments, "--debug"]) == 3
    assert "Traceback" in capfd.readouterr().err
