"""`qeval diff`: the same model in two finished runs."""

from pathlib import Path
from typing import Annotated

import typer

from qeval.cli import options
from qeval.cli.printing import stdout
from qeval.errors import UsageError

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
    from qeval.diff import diff as compared  # noqa: PLC0415 - the statistics take a second to import
    from qeval.diff import diff_json  # noqa: PLC0415
    from qeval.diff.tables import diff_tables, sentences  # noqa: PLC0415
    from qeval.report.console import terminal_table  # noqa: PLC0415

    found = compared(run_a, run_b, [_pair(text) for text in variant or []])
    if as_json:
        typer.echo(diff_json(found), nl=False)
        return
    console = stdout(_WIDTH)
    for table in diff_tables(found):
        console.print(terminal_table(table, table.note))
    for sentence in [*(f"note: {note}" for note in found.notes), *sentences(found)]:
        console.print(sentence, highlight=False, markup=False)


def _pair(text: str) -> tuple[str, str]:
    mine, separator, other = text.partition("=")
    if not mine or (separator and not other):
        raise UsageError(f"--variant takes NAME or NAME_IN_A=NAME_IN_B, not '{text}'.")
    return mine, other if separator else mine
