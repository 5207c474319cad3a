"""`qeval diff`: the same model in two finished runs."""

from pathlib import Path
from typing import Annotated

import typer

import qeval
from qeval.cli import options
from qeval.cli.printing import print_json, stdout

_WIDTH = 150
"""Columns for tables whose cells hold text."""


def diff(
    run_a: Annotated[Path, typer.Argument(help="The folder of the run to compare with.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="The folder of the run in question.", show_default=False)],
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="NAME, or NAME_IN_A=NAME_IN_B; may be repeated. Default: equal names."),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare two runs of one model row by row: versions of a tool, backends, recipes."""
    del debug  # read by the program's own error handler
    difference = qeval.diff(run_a, run_b, variants=variant)
    from qeval.report.console import terminal_table  # noqa: PLC0415
    from qeval.report.diff import diff_json  # noqa: PLC0415 - the statistics take a second to import
    from qeval.report.diff.tables import diff_tables, sentences  # noqa: PLC0415

    if as_json:
        print_json(diff_json(difference))
        return
    console = stdout(_WIDTH)
    for table in diff_tables(difference):
        console.print(terminal_table(table, table.note))
    for sentence in [*(f"note: {note}" for note in difference.notes), *sentences(difference)]:
        console.print(sentence)
