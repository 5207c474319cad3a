"""Careless use of every command: one sentence, its exit code, nothing on stdout, no traceback, no work done."""

import io
import sys

import pytest
from rich.console import Console

import qeval.__main__ as door
from qeval.cli.app import run_program
from qeval.cli.printing import plan_table
from tests.fixtures.gate import INT4, RELEASE
from tests.fixtures.runs import Shape, make_run
from tests.fixtures.tiny import save_tiny

FILES = {"empty.yaml": "", "list.yaml": "- 1\n", "text.txt": "words\n", "empty.txt": "", "binary": b"\xff\x00" * 99}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("careless")
    make_run(folder / "run", Shape(variants=(INT4,), windows=4, questions=2))
    save_tiny(folder / "model")
    (folder / "nothing").mkdir()
    for name, text in FILES.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))


WRONG = {
    "no such command": ("compre", "No such command 'compre'. Did you mean 'compare'?"),
    "no such flag": ("compare --modl x", "No such option: --modl"),
    "a flag without its value": ("compare --model", "Option '--model' requires an argument."),
    "a number that is none": ("compare --model x --seed abc", "Invalid value for '--seed'"),
    "a file as a run to gate": (f"gate text.txt --policy {RELEASE}", "'text.txt' holds no run"),
    "a file as a run to explain": ("explain text.txt rtn", "'text.txt' holds no run"),
    "a file as a run to show": ("card text.txt", "'text.txt' holds no run"),
    "a file as a run to compare": ("diff run text.txt", "'text.txt' holds no run"),
    "a file as a run to verify": ("verify text.txt", "'text.txt' holds no finished rows"),
    "a folder without a run": (f"gate nothing --policy {RELEASE}", "'nothing' holds no run"),
    "a policy that is empty": ("gate run --policy empty.yaml", "it must hold a mapping with 'name' and 'rules'"),
    "a policy that is a list": ("gate run --policy list.yaml", "it must hold a mapping with 'name' and 'rules'"),
    "a policy that is no text": ("gate run --policy binary", "'binary' is not valid YAML"),
    "a policy that is a folder": ("gate run --policy nothing", "There is no policy 'nothing' to read"),
    "a pair without names": ("diff run run --variant =", "--variant takes NAME or NAME_IN_A=NAME_IN_B, not '='."),
    "no variant of that name": ("explain run awq", "Unknown variant of the run 'run' 'awq'. Choices: rtn."),
    "a card for a folder": ("card run --into nothing", "--into nothing is a folder; name a file."),
    "figures in an empty table": ("selfcheck --table empty.yaml", "no table of published figures (the whole file: "),
    "figures in no table": ("selfcheck --table binary", "'binary' is not valid YAML"),
    "figures on no device": ("selfcheck --device tpu", "Unknown device 'tpu'; say auto, cpu, cuda, cuda:1 or mps."),
    "data that are not there": ("selfcheck --data gone", "--data gone: there is no such folder."),
    "questions that are not there": ("selfcheck --mmlu-dir gone", "--mmlu-dir gone: there is no such folder."),
    "a file for a sweep's runs": ("sweep --models model --out text.txt", "--out text.txt is a file; name a folder"),
    "a place under a file": (
        "compare --model model --methods rtn:g32 --out text.txt/a/b",
        "--out text.txt/a/b lies under a file; name a folder for the report.",
    ),
    "more threads than there can be": ("compare --model model --threads 99999", "--threads 99999 is more than 16 for"),
    "no end to a budget": ("bench --model model --time-budget inf", "--time-budget must be a finite number, not"),
    "no number as a budget": ("bench --model model --time-budget nan", "--time-budget must be a finite number, not"),
    "a width that no grid has": ("sweep --models model --bits 4,9", "--bits takes widths from 2 to 8 such as"),
    "blocks of nothing": ("sweep --models model --groups 0", "--groups takes block sizes, channel and tensor"),
    "a file for maps": (
        "sensitivity --model model --method rtn:g32 --out text.txt",
        "--out text.txt is a file; name a folder for the maps.",
    ),
    "a budget for no mix": (
        "quantize --model model --method rtn:g32 --budget 4bpw",
        "--budget is for mixed methods, and none is among rtn:g32; add one, or leave --budget out.",
    ),
    "a ranking for no mix": (
        "compare --model model --methods rtn:g32,awq:g32 --importance fisher",
        "--importance is for mixed methods, and none is among rtn:g32, awq:g32;",
    ),
    "a budget for the float model": (
        "export --model model --method float --budget 4bpw",
        "--budget is for mixed methods",
    ),
}


@pytest.mark.parametrize(("command", "said"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_sentence_and_code_2(place, capfd, command, said):
    before = sorted(place.rglob("*"))
    capfd.readouterr()
    assert run_program(command.split()) == 2
    heard = capfd.readouterr()
    assert heard.out == ""
    assert said in heard.err
    assert heard.err.startswith("error: ")
    assert heard.err.count("\n") == 1
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("width", [20, 40, 200])
def test_a_narrow_terminal_cuts_nothing_off_a_plan(width):
    console = Console(width=width, file=io.StringIO())
    table = plan_table()
    table.add_row("report", "a/folder/whose/name/is/long/enough/to/be/cut")
    console.print(table)
    shown = console.file.getvalue()
    assert "".join(shown.split()) == "reporta/folder/whose/name/is/long/enough/to/be/cut"


def test_ctrl_c_while_the_program_is_being_imported_is_a_line(monkeypatch, capsys):
    class Pressed:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "qeval.cli.app", Pressed())
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted before anything was done.\n"


def test_an_unforeseen_failure_is_one_line_with_its_file_or_its_name(monkeypatch, capfd):
    for error, said in (
        (PermissionError(13, "Permission denied", "run.json"), "Cannot use run.json: Permission denied."),
        (ValueError("one\n  two"), "ValueError: one two"),
    ):
        monkeypatch.setattr("qeval.report.run_rows.read_run", lambda _, error=error: (_ for _ in ()).throw(error))
        assert run_program(["explain", "run", "rtn"]) == 3
        assert capfd.readouterr().err == f"error: {said} (--debug shows where)\n"
