"""`qeval sweep`: the same comparison of several models, and one page for all."""

import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

import qeval
from qeval.api.parallel import ComparisonProcess
from qeval.api.sweeping import SweepListener
from qeval.cli import options
from qeval.cli.commands import parser_of
from qeval.cli.compare import compare, print_plan, print_result
from qeval.cli.printing import stderr, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.arguments import joined, names, slug
from qeval.errors import QevalError, UsageError

if TYPE_CHECKING:
    from qeval.compare.plan import Plan
    from qeval.results import Run

_NOT_SHARED = ("context", "model", "out", "as_json", "quiet", "debug")


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
    calibration_seeds: Annotated[
        int,
        typer.Option(
            "--calibration-seeds",
            min=1,
            help="Draws of each text of --calibration (several with commas): how far they move each method.",
        ),
    ] = 1,
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
    if "--json" in context.args:
        raise UsageError(f"A sweep prints no JSON; it writes {out / 'sweep.json'}.")
    words = list(context.args)
    flags = _flags_of_compare(words) if names(models) else {}  # that there is no model is told first
    console, quiet = stderr(), bool(flags.get("quiet"))
    shared = {name: value for name, value in flags.items() if name not in _NOT_SHARED}
    result = qeval.sweep(
        models,
        out=out,
        bits=bits,
        groups=groups,
        budgets=budgets,
        calibration_seeds=calibration_seeds,
        models_at_once=models_at_once,
        progress=functools.partial(ConsoleProgress, console, quiet=quiet),
        listener=_Shown(console, quiet=quiet, debug=debug),
        commands={name: _command(name, out, words) for name in names(models)},
        **shared,
    )
    from qeval.report.calibration_spread import spread_tables  # noqa: PLC0415 - the statistics, as below
    from qeval.report.console import terminal_table  # noqa: PLC0415 - matplotlib, which `--help` need not wait for
    from qeval.report.sweep import Ended, sweep_table  # noqa: PLC0415

    ended = [Ended(each.name, each.folder, each.error, case=each.case) for each in result.models]
    stdout().print(terminal_table(sweep_table(ended)))
    for table in spread_tables(result.spread) if result.spread else ():
        stdout().print(terminal_table(table, table.note))
    console.print(f"report of all models: {result.page}", soft_wrap=True)
    return result.exit_code


def _flags_of_compare(words: Sequence[str]) -> dict[str, Any]:
    """Return what `compare` would be called with for these words, by its own parser.

    Raises:
        typer.TyperException: A flag is wrong.
    """

    @functools.wraps(compare)
    def parsed(**values: Any) -> dict[str, Any]:
        return values

    command = parser_of(parsed, "compare")
    values: dict[str, Any] = command.main(args=[*words, "--model", "model"], standalone_mode=False)
    return values


def _command(name: str, out: Path, words: Sequence[str]) -> str:
    """Return the command that compares one model of the sweep alone."""
    return shlex.join(["qeval", "compare", *words, "--model", name, "--out", str(out / slug(name))])


class _Shown(SweepListener):
    """Prints how a sweep goes."""

    def __init__(self, console: Console, *, quiet: bool, debug: bool) -> None:
        """Print nothing yet."""
        self._console, self._quiet, self._debug = console, quiet, debug

    def start(self, folders: Mapping[str, Path], at_once: int, options: Mapping[str, Any]) -> None:
        """Print what the sweep will do: every model with the same variants and tasks, and where each goes."""
        variants = [joined(options["methods"]), str(options["config"] or ""), *(options["variants"] or [])]
        where = "on one Ray cluster" if options["executor"] == "ray" else "on this machine"
        if not self._quiet:
            self._print(
                f"models    {len(folders)}, {at_once} at a time {where}",
                *(f"          {name} -> {folder}" for name, folder in folders.items()),
                f"variants  {', '.join(filter(None, variants)) or 'those of compare'}",
                f"tasks     {options['tasks']}",
            )

    def start_model(self, place: int, count: int, name: str) -> None:
        """Print which model begins."""
        self._console.print(f"model {place} of {count}: {name}")

    def plan(self, plan: "Plan") -> None:
        """Print what is done with it."""
        if not self._quiet:
            print_plan(plan, self._console)

    def finish(self, run: "Run") -> None:
        """Print its table."""
        print_result(run, self._console, as_json=False)

    def fail(self, name: str, error: QevalError) -> None:
        """Print why it has no run, after the traceback if asked for."""
        del name
        if self._debug:
            self._console.print_exception()
        self._console.print(f"warning: {error}", soft_wrap=True)

    @contextmanager
    def watch(self, comparisons: Sequence[ComparisonProcess]) -> Iterator[None]:
        """Show a table of one line a model on a terminal."""

        def table() -> Table:
            rows = Table.grid(padding=(0, 2))
            for each in comparisons:
                rows.add_row(each.name, f"{each.seconds:.0f} s" if each.seconds else "", each.state())
            return rows

        shown = self._console.is_terminal and not self._quiet
        with Live(get_renderable=table, console=self._console, refresh_per_second=2) if shown else nullcontext():
            yield

    def end(self, comparison: ComparisonProcess) -> None:
        """Print what one of several warned of, and how it ended."""
        self._print(*(f"{comparison.name}: {line}" for line in comparison.lines()))
        if not self._quiet:
            self._print(f"{comparison.name}: {comparison.state()} after {comparison.seconds:.0f} s")

    def _print(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, soft_wrap=True)
