"""`qeval card`: what a model page shows of a finished run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qeval.cli import options


def card(
    run: options.Run,
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
    from qeval import card as cards  # noqa: PLC0415 - the statistics and plots take a second to import

    done = cards.into(run, into, variant) if into else cards.write(run, variant)
    console = Console(stderr=True)
    if not done.metadata:
        console.print(
            f"note: the front matter of {done.card} has no lines '# qeval:begin' and '# qeval:end', so no model-index "
            "was put there.",
            highlight=False,
            soft_wrap=True,
        )
    for path in (done.card, *done.plots):
        typer.echo(str(path))
