"""`qeval selfcheck`: published figures made again on this machine, with their deviations."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from qeval.api import benchmark
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.options import Option
from qeval.compare.settings import Settings

if TYPE_CHECKING:
    from qeval.jobs.selfcheck import CheckedRow

    pass

_WIDTH = 160


@with_flags_of(
    benchmark.selfcheck,
    trees=(Settings,),
    rows=Option("Comma-separated ids or patterns such as 'demo-*'. Default: all.", type=str | None),
    table=Option("A YAML file of figures; default: the shipped configs/selfcheck.yaml.", type=Path | None),
    data=Option("Folder with WikiText-2's files; else QEVAL_HOME/data, else the hub.", type=Path | None),
    mmlu_dir="Folder with dev/ and test/ in MMLU's csv layout; default: hub.",
)
def selfcheck(call: CommandCall) -> int:
    """Reproduce published figures: what this machine can reach, each with its deviation, and what it can't, and why.

    Exit codes: 0 all that was reached is within tolerance, 1 a row is out of it, 2 wrong use, 3 nothing was reached.
    """
    rows = benchmark.selfcheck(**call.values, progress=ConsoleProgress(stderr(), quiet=call.quiet))
    from qeval.jobs.selfcheck import selfcheck_exit_code  # noqa: PLC0415 - torch takes seconds to import

    code = selfcheck_exit_code(rows)
    if call.as_json:
        print_json(json.dumps({"exit_code": code, "rows": [_as_json(row) for row in rows]}, indent=1, allow_nan=False))
    else:
        _show(rows, code)
    return code


def _as_json(row: "CheckedRow") -> dict[str, object]:
    return asdict(row) | {"deviation": row.deviation}


def _show(rows: Sequence["CheckedRow"], code: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("row", "model", "of", "metric", "published", "measured", "deviation", "allowed", "", "source"):
        table.add_column(name, overflow="fold")
    for row in rows:
        if row.status != "not reached":
            figures = ("–", "–") if row.deviation is None else (f"{row.measured:.6g}", f"{row.deviation:+.2g}")
            status = row.status if row.reason is None else f"{row.status}: {row.reason}"
            limits = (f"{row.tolerance:.2g}", status, row.source)
            table.add_row(row.id, row.model, row.of, row.metric, f"{row.published:.6g}", *figures, *limits)

    console = stdout(_WIDTH)
    if table.row_count:
        console.print(table)
    for row in rows:
        if row.status == "not reached":
            console.print(f"not reached: {row.id}: {row.reason}", soft_wrap=True)

    counts = {status: sum(row.status == status for row in rows) for status in ("within", "out", "not reached")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"{summary} (exit code {code})")
