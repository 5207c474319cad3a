"""`qeval gate`: a policy's verdict on a finished run, as an exit code that a release pipeline can trust."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeval.cli import options
from qeval.cli.printing import stdout

if TYPE_CHECKING:
    from qeval.gate.verdict import GateVerdict

_WIDTH = 160
"""Columns for a table whose last one holds sentences."""
SUMMARY = "GITHUB_STEP_SUMMARY"


def gate(
    run: options.Run,
    policy: Annotated[Path, typer.Option("--policy", help="YAML file of margins, such as configs/gates/release.yaml.")],
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Gate this variant alone; may be repeated. Default: all.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", help=f"Write a Markdown summary here (${SUMMARY} is added to when set)."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Judge a run by a policy. Exit codes: 0 pass, 1 fail, 2 wrong use, 3 broken run, 4 inconclusive."""
    del debug  # read by the program's own error handler
    from qeval.gate.judge import judge  # noqa: PLC0415 - the statistics take a second to import
    from qeval.gate.policy import load_policy  # noqa: PLC0415

    verdict = judge(run, load_policy(policy), variant or ())
    _write(verdict, junit, markdown)
    _show(verdict, as_json=as_json, quiet=quiet)
    return verdict.exit_code


def _write(verdict: "GateVerdict", junit: Path | None, markdown: Path | None) -> None:
    from qeval.gate import outputs  # noqa: PLC0415
    from qeval.store.atomic import write_text  # noqa: PLC0415

    if junit:
        outputs.write_junit(verdict, junit)
    if markdown:
        write_text(markdown, outputs.markdown(verdict))
    if summary := os.environ.get(SUMMARY):
        outputs.append_markdown(verdict, Path(summary))


def _show(verdict: "GateVerdict", *, as_json: bool, quiet: bool) -> None:
    from qeval.gate import outputs  # noqa: PLC0415

    if as_json:
        typer.echo(outputs.as_json(verdict), nl=False)
        return
    console = stdout(_WIDTH)
    if not quiet:
        console.print(outputs.table(verdict))
        for note in (verdict.correction, *verdict.notes):
            console.print(note, highlight=False, markup=False)
    console.print(f"{verdict.policy}: {verdict.outcome} (exit code {verdict.exit_code})", highlight=False, markup=False)
