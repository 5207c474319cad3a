"""`qeval import`: other programs' rows as a run."""

from pathlib import Path
from typing import Annotated

import typer

import qeval
from qeval.cli import options
from qeval.cli.printing import print_json, stdout


def import_rows(
    context: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(
            help="FILE, or NAME=FILE for a model's name: lm-eval's samples_*.jsonl or a folder of them, Inspect's log, "
            "or a table (CSV, JSONL, Parquet) of item and score.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder of the run.", show_default=False)],
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The model that others are compared with; default: the first.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Take all files as one task; each file's own is a subject of it.")
    ] = None,
    repeats: Annotated[
        bool, typer.Option("--repeats", help="Several files of one task and model are repeats (seeds) of it.")
    ] = False,
    higher_is_better: Annotated[
        bool | None,
        typer.Option(
            "--higher-is-better/--lower-is-better", help="The direction of metrics whose direction is not known."
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make a run of rows that other programs measured, which gate, diff and card read as any other."""
    del debug  # read by the program's own error handler
    from qeval.report import report_json, summary_table  # noqa: PLC0415 - the statistics take a second to import
    from qeval.report.summary import summary  # noqa: PLC0415

    run = qeval.import_rows(
        files, out=out, baseline=baseline, task=task, repeats=repeats, higher_is_better=higher_is_better,
        command=str(context.obj),
    )  # fmt: skip
    if as_json:
        print_json(report_json(run.report))
        return
    console = stdout()
    if not quiet:
        console.print(summary_table(run.report))
        for sentence in [*(f"note: {note}" for note in run.report.warnings), *summary(run.report)]:
            console.print(sentence)
    console.print(f"run: {out}; gate it with `qeval gate {out} --policy FILE`", soft_wrap=True)
