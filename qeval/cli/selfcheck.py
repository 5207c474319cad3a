"""`qeval selfcheck`: published figures made again on this machine, with their deviations."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qeval.cli import options
from qeval.cli.printing import stdout
from qeval.cli.progress import ConsoleProgress

if TYPE_CHECKING:
    from qeval.compare.selfcheck import Checked

_WIDTH = 160


def selfcheck(
    rows: Annotated[
        str | None, typer.Option("--rows", help="Comma-separated ids or patterns such as 'demo-*'. Default: all.")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="A YAML file of figures; default: the shipped configs/selfcheck.yaml."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with WikiText-2's files; else QEVAL_HOME/data, else the hub.")
    ] = None,
    mmlu_dir: Annotated[
        Path | None, typer.Option("--mmlu-dir", help="Folder with dev/ and test/ in MMLU's csv layout; default: hub.")
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Reproduce published figures: what this machine can reach, each with its deviation, and what it can't, and why.

    Exit codes: 0 all that was reached is within tolerance, 1 a row is out of it, 2 wrong use, 3 nothing was reached.
    """
    del debug  # read by the program's own error handler
    from qeval.compare.selfcheck import Where, exit_code, read_runs  # noqa: PLC0415 - torch takes seconds to import
    from qeval.compare.selfcheck import selfcheck as check  # noqa: PLC0415

    patterns = [name for name in (part.strip() for part in (rows or "").split(",")) if name]
    progress = ConsoleProgress(Console(stderr=True), quiet=quiet)
    found = check(read_runs(table, patterns), Where(data, mmlu_dir, device, threads), progress)
    code = exit_code(found)
    if as_json:
        typer.echo(json.dumps({"exit_code": code, "rows": [_as_json(row) for row in found]}, indent=1, allow_nan=False))
    else:
        _show(found, code)
    return code


def _as_json(row: "Checked") -> dict[str, object]:
    return asdict(row) | {"deviation": row.deviation}


def _show(found: Sequence["Checked"], code: int) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("row", "model", "of", "metric", "published", "measured", "deviation", "allowed", "", "source"):
        shown.add_column(name, overflow="fold")
    for row in found:
        if row.status != "not reached":
            figures = ("–", "–") if row.deviation is None else (f"{row.measured:.6g}", f"{row.deviation:+.2g}")
            told = row.status if row.reason is None else f"{row.status}: {row.reason}"
            limits = (f"{row.tolerance:.2g}", told, row.source)
            shown.add_row(row.id, row.model, row.of, row.metric, f"{row.published:.6g}", *figures, *limits)
    console = stdout(_WIDTH)
    if shown.row_count:
        console.print(shown, highlight=False)
    for row in found:
        if row.status == "not reached":
            console.print(f"not reached: {row.id}: {row.reason}", highlight=False, markup=False, soft_wrap=True)
    counts = {status: sum(row.status == status for row in found) for status in ("within", "out", "not reached")}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"{told} (exit code {code})", highlight=False)
