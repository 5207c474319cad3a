"""`qeval doctor`: what of this machine works, what does not, and the command that repairs it."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qeval.cli import options
from qeval.cli.printing import print_json, stdout

if TYPE_CHECKING:
    from qeval.doctor.checks import Diagnosis

_WIDTH = 140
_TITLES = {"machine": "machine", "packages": "packages", "hub": "hub and caches", "model": "the model"}
_MARKS = {"ok": ("ok", "green"), "note": ("-", "dim"), "wrong": ("wrong", "red")}


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Also say whether this model fits, and how long a comparison takes.")
    ] = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Look at Python, torch, GPUs, ONNX Runtime, extras, the hub and the caches, and say what mends what is wrong.

    Of a model only the configuration is read. Exit codes: 0 nothing is wrong, 1 something is, 2 wrong use.
    """
    del debug  # read by the program's own error handler
    from qeval.doctor.diagnosis import diagnose  # noqa: PLC0415 - torch takes seconds to import

    diagnosis = diagnose(model, revision, is_offline=offline)
    if as_json:
        print_json(diagnosis.model_dump_json(indent=1))
    else:
        _show(diagnosis)
    return diagnosis.exit_code


def _show(diagnosis: "Diagnosis") -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    part = None
    for check in diagnosis.checks:
        if check.part != part:
            part = check.part
            table.add_row("", Text(_TITLES[part], style="bold"), "", "", end_section=False)
        mark, style = _MARKS[check.status]
        table.add_row(Text(mark, style=style), Text(check.name), Text(check.value), Text(check.fix or ""))
    console = stdout(_WIDTH)
    console.print(table)
    wrong = sum(check.status == "wrong" for check in diagnosis.checks)
    verdict = "nothing is wrong" if diagnosis.ok else f"{wrong} wrong"
    console.print(f"{verdict} (exit code {diagnosis.exit_code})")
