"""`qeval advise`: what a variant loses by, and what its treatments gain."""

from pathlib import Path
from typing import Annotated

import typer

import qeval
from qeval.cli import options
from qeval.cli.printing import print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress

_WIDTH = 160
"""Columns for tables whose cells hold text."""


def advise(
    run: options.RunFolder,
    variant: Annotated[
        str | None, typer.Argument(help="One of its variants; default: the one with the largest KL.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option("--corpus", help="A text that the run did not score; default: what follows its windows."),
    ] = None,
    max_windows: Annotated[
        int, typer.Option("--max-windows", min=4, help="Held-out windows that treatments are measured on.")
    ] = 16,
    offline: options.Offline = False,
    threads: options.Threads = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the advice goes; default: RUN/advice.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Find what a variant loses by, propose at most three treatments, and measure each on held-out windows.

    Treatments: SmoothQuant or a rotation for activation outliers, AWQ for salient columns, keys and values by channel
    or rotated, 8 bits for a sensitive head, a mix for a sensitive group.
    """
    del debug  # read by the program's own error handler
    console = stderr()
    _, page, advice = qeval.advise(
        run, variant, corpus=corpus, max_windows=max_windows, offline=offline, threads=threads, out=out,
        progress=ConsoleProgress(console, quiet=quiet),
    )  # fmt: skip
    from qeval.report.advice import advice_sentences, advice_tables  # noqa: PLC0415 - the statistics take a second
    from qeval.report.console import terminal_table  # noqa: PLC0415

    if as_json:
        print_json(advice.model_dump_json(indent=2))
        return
    printed = stdout(_WIDTH)
    for table in advice_tables(advice):
        printed.print(terminal_table(table, table.note))
    for sentence in [*(f"note: {note}" for note in advice.notes), *advice_sentences(advice)]:
        printed.print(sentence, soft_wrap=True)
    if not quiet:
        console.print(f"page: {page}", soft_wrap=True)
