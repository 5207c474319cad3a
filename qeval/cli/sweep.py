"""`qeval sweep`: the same comparison of several models, and one page for all."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from rich.console import Console

from qeval.cli import options
from qeval.cli.abreast import Comparison, Result, run_abreast
from qeval.cli.compare import compare, slug
from qeval.cli.grid import grid_methods, without_methods
from qeval.cli.printing import stdout
from qeval.errors import QevalError, UsageError
from qeval.paths import check_place

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
    models_at_once: Annotated[
        int | None,
        typer.Option(
            "--models-at-once",
            min=1,
            help="Models compared at a time; default: 1, on Ray as many as the cluster holds.",
        ),
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
    check_place(out, "the runs")
    if "--json" in context.args:
        raise UsageError(f"A sweep prints no JSON; it writes {out / 'sweep.json'}.")
    command, common = _command(), list(context.args)
    if bits or groups or budgets:
        common, methods = without_methods(common)
        common += ["--methods", ",".join(grid_methods(methods, bits, groups, budgets))]
    given = {name: [*common, "--model", name, "--out", str(folder)] for name, folder in folders.items()}
    asked = command.make_context("compare", list(given[names[0]])).params  # a wrong flag is told before any work
    with _room(asked, models_at_once, len(given)) as (at_once, environment):
        if not asked["quiet"]:
            for line in _plan(asked, folders, at_once):
                _console().print(line, highlight=False, markup=False, soft_wrap=True)
        if at_once == 1:
            results = [_compared_here(command, place, name, given, debug=debug) for place, name in enumerate(given, 1)]
        else:
            results = _compared_abreast(given, folders, at_once, asked, environment)
    if all(result.error and result.code == UsageError.exit_code for result in results):
        raise UsageError(f"No model could be compared: {results[0].error}")
    _show([(name, folders[name], result.error) for name, result in zip(given, results, strict=True)], out)
    return max(QevalError.exit_code if result.error else result.code for result in results)


@contextmanager
def _room(asked: Mapping[str, Any], at_once: int | None, models: int) -> Iterator[tuple[int, dict[str, str]]]:
    """How many models are compared at a time, and the environment of their processes: of one Ray cluster for all.

    Raises:
        UsageError: Ray is asked for and isn't installed.
        QevalError: the cluster can't be reached.
    """
    if asked["executor"] != "ray" or models == 1:
        yield min(at_once or 1, models), dict(os.environ)
        return
    from qeval.executors.cluster import shared_cluster  # noqa: PLC0415 - an extra

    with shared_cluster() as (address, cpus):
        holds = max(1, cpus // max(asked["workers"], asked["threads"] or os.cpu_count() or 1))
        yield min(at_once or holds, holds, models), os.environ | {"RAY_ADDRESS": address}


def _plan(asked: Mapping[str, Any], folders: Mapping[str, Path], at_once: int) -> list[str]:
    """What the sweep will do: every model with the same variants and tasks, and where each goes."""
    variants = [asked["methods"] or "", str(asked["config"] or ""), *(asked["variant"] or [])]
    where = "on one Ray cluster" if asked["executor"] == "ray" else "on this machine"
    return [
        f"models    {len(folders)}, {at_once} at a time {where}",
        *(f"          {name} -> {folder}" for name, folder in folders.items()),
        f"variants  {', '.join(filter(None, variants)) or 'those of compare'}",
        f"tasks     {asked['tasks']}",
    ]


def _compared_here(
    command: typer.core.TyperCommand, place: int, name: str, given: Mapping[str, Sequence[str]], *, debug: bool
) -> Result:
    _console().print(f"model {place} of {len(given)}: {name}", highlight=False)
    return _compared(command, given[name], debug=debug)


def _compared_abreast(
    given: Mapping[str, Sequence[str]],
    folders: Mapping[str, Path],
    at_once: int,
    asked: Mapping[str, Any],
    environment: Mapping[str, str],
) -> list[Result]:
    """Several at a time; on this machine they share the cores unless --threads says otherwise."""
    more = []
    if asked["threads"] is None and asked["executor"] == "local":
        more = ["--threads", str(max(1, (os.cpu_count() or 1) // at_once))]
    comparisons = [Comparison(name, [*words, *more], folders[name]) for name, words in given.items()]
    return run_abreast(comparisons, at_once, environment, _console(), quiet=asked["quiet"])


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


def _compared(command: typer.core.TyperCommand, arguments: Sequence[str], *, debug: bool) -> Result:
    """Compare one model: the exit code, and why there is no report, or None."""
    try:
        code = command.main(
            args=list(arguments), standalone_mode=False, obj=shlex.join(["qeval", "compare", *arguments])
        )
    except QevalError as error:
        if debug:
            _console().print_exception()
        _console().print(f"warning: {error}", highlight=False, soft_wrap=True)
        return Result(error.exit_code, str(error))
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return Result(int(code or 0), None)


def _command() -> typer.core.TyperCommand:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name="compare")(compare)
    made = typer.main.get_command(alone)
    assert isinstance(made, typer.core.TyperCommand)
    return made


def _console() -> Console:
    return Console(stderr=True)
