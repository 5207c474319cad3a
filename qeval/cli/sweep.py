"""`qeval sweep`: the same comparison of several models, and one page for all."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import typer.core
import typer.main
from rich.console import Console

from qeval.cli import options
from qeval.cli.compare import compare, slug
from qeval.cli.grid import grid_methods, without_methods
from qeval.cli.printing import stdout
from qeval.errors import QevalError, UsageError

INTERRUPTED = 130
"""What typer makes of Ctrl-C."""

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""All other flags are those of `compare`."""


def sweep(
    context: typer.Context,
    models: Annotated[str, typer.Option("--models", help="Comma-separated: what `compare` takes as --model.")],
    out: Annotated[
        Path, typer.Option("--out", help="A folder; each model's run goes into one of its own there.")
    ] = Path("reports/sweep"),
    bits: Annotated[
        str | None, typer.Option("--bits", help="Widths that every method is made at, such as 2,3,4,5,6,8.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", help="Block sizes, channel, tensor, such as 32,64,128,channel.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Sizes of mixed variants, such as 4.5,4.8,5.5bpw.")
    ] = None,
    debug: options.Debug = False,
) -> int:
    """Compare several models each with its variants (all other flags are those of `qeval compare`), on one page.

    A model that fails is told, and the others are done all the same; the same command goes on where it stopped.
    """
    names = list(dict.fromkeys(name for name in (part.strip() for part in models.split(",")) if name))
    folders = {name: out / slug(name) for name in names}
    if not names:
        raise UsageError("Nothing to sweep over: give --models, for example --models demo,llama-3.2-1b.")
    if len(set(folders.values())) < len(names):
        raise UsageError(f"Two of the models {', '.join(names)} would share a folder; sweep them apart.")
    if "--json" in context.args:
        raise UsageError(f"A sweep prints no JSON; it writes {out / 'sweep.json'}.")
    command, common = _command(), list(context.args)
    if bits or groups or budgets:
        common, methods = without_methods(common)
        common += ["--methods", ",".join(grid_methods(methods, bits, groups, budgets))]
    given = {name: [*common, "--model", name, "--out", str(folder)] for name, folder in folders.items()}
    for arguments in given.values():
        command.make_context("compare", list(arguments))  # a wrong flag is told before any work starts
    codes, ended = [], []
    for place, (name, arguments) in enumerate(given.items(), 1):
        _console().print(f"model {place} of {len(given)}: {name}", highlight=False)
        code, error = _compared(command, arguments, debug=debug)
        codes.append(code)
        ended.append((name, folders[name], error))
    _show(ended, out)
    return max(codes)


def _show(models: Sequence[tuple[str, Path, str | None]], out: Path) -> None:
    """Write the page of all models (name, folder, why it failed) and print its table."""
    from qeval.report.console import terminal_table  # noqa: PLC0415 - matplotlib, which `--help` need not wait for
    from qeval.report.sweep import Ended, overview, write_sweep  # noqa: PLC0415

    ended = [Ended(*model) for model in models]
    failed = [run.error for run in ended if run.error is not None]
    if len(failed) == len(ended):
        raise QevalError(f"No model could be compared: {failed[0]}")
    written = write_sweep(ended, out)
    stdout().print(terminal_table(overview(ended)))
    _console().print(f"report of all models: {written}", highlight=False, soft_wrap=True)


def _compared(command: typer.core.TyperCommand, arguments: Sequence[str], *, debug: bool) -> tuple[int, str | None]:
    """Compare one model: the exit code, and why there is no report, or None."""
    try:
        code = command.main(
            args=list(arguments), standalone_mode=False, obj=shlex.join(["qeval", "compare", *arguments])
        )
    except QevalError as error:
        if debug:
            _console().print_exception()
        _console().print(f"warning: {error}", highlight=False, soft_wrap=True)
        return QevalError.exit_code, str(error)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return int(code or 0), None


def _command() -> typer.core.TyperCommand:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name="compare")(compare)
    made = typer.main.get_command(alone)
    assert isinstance(made, typer.core.TyperCommand)
    return made


def _console() -> Console:
    return Console(stderr=True)
