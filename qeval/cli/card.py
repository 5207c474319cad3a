"""`qeval card`: what a model page shows of a finished run."""

from pathlib import Path
from typing import Annotated

import typer

import qeval
from qeval.cli import options
from qeval.cli.printing import print_line, stderr


def card(
    run: options.RunFolder,
    variant: Annotated[
        str | None, typer.Option("--variant", help="The variant that the metadata is about; default: all.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option("--into", help="A README.md whose section between the qeval markers is replaced."),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write a model card's section, with metadata, tables and plots, from a finished run's folder alone."""
    del debug  # read by the program's own error handler
    files = qeval.card(run, variant, into=into)
    console = stderr()
    if not files.metadata:
        console.print(
            f"note: the front matter of {files.card} has no lines '# qeval:begin' and '# qeval:end', so no model-index "
            "was put there.",
            soft_wrap=True,
        )
    for path in (files.card, *files.plots):
        print_line(str(path))
