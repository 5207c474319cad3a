"""`qeval board`: runs of one token hash over time."""

from pathlib import Path
from typing import Annotated

import typer

from qeval.api.history import update_board
from qeval.cli import options
from qeval.cli.printing import stderr, stdout

_WIDTH = 150
"""Columns for tables whose cells hold text."""


def board(
    out: Annotated[Path, typer.Option("--out", help="The board's folder; what was added before stays.")],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of finished runs to add; none: write the page again.")
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept these runs: `qeval gate --against BOARD` compares with the last.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option("--export", help="mlflow or wandb: write all runs of the board there, by that client, too."),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Show runs of one token hash over time: figures with intervals, trends, and the points where they change."""
    del debug  # read by the program's own error handler
    page, series, exported = update_board(runs or [], out=out, accept=accept, export=export)
    from qeval.board.page import change_sentences, latest_table  # noqa: PLC0415
    from qeval.report.console import terminal_table  # noqa: PLC0415 - the statistics take a second to import

    console = stdout(_WIDTH)
    table = latest_table(series)
    console.print(terminal_table(table, table.note))
    for sentence in change_sentences(series):
        console.print(sentence)
    if exported is not None:
        stderr().print(f"{export}: {exported} runs written, one a variant")
    stderr().print(f"page: {page}", soft_wrap=True)
