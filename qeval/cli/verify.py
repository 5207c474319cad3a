"""`qeval verify`: whether a run's rows are what was written, and what the model answers."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.printing import stdout
from qeval.cli.progress import ConsoleProgress

if TYPE_CHECKING:
    from qeval.compare.verify import Derived, Verification

_WIDTH = 180


def verify(
    run: options.Run,
    sample: Annotated[
        int, typer.Option("--sample", min=0, help="Shards of rows to compute again; 0: checksums alone.")
    ] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides which.")] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Check every checksum of a run, and compute a random sample of its rows again from the model.

    Exit codes: 0 verified, 1 something differs, 2 wrong use, 3 no rows could be computed.
    """
    del debug  # read by the program's own error handler
    from qeval.compare.verify import verify_run  # noqa: PLC0415 - torch takes seconds to import

    progress = ConsoleProgress(Console(stderr=True), quiet=quiet)
    found = verify_run(run, sample=sample, seed=seed, progress=progress)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        _show(found)
    return found.exit_code


def _show(found: "Verification") -> None:
    console = stdout(_WIDTH)
    lines = [f"checked: {what}" for what in found.looked_at]
    lines += [f"derived: {_derived(each)}" for each in found.derived]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"differs: {problem}" for problem in found.problems]
    lines += [f"not done: {found.undone}"] if found.undone else []
    verdict = {0: "verified", 1: "something differs", 3: "no rows could be computed again"}[found.exit_code]
    for line in [*lines, f"{found.run}: {verdict} (exit code {found.exit_code})"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _derived(each: "Derived") -> str:
    what = f"{each.rows:,} rows of {each.name} ({each.kind})"
    if each.identical:
        return f"{what}, the same bytes"
    if each.largest_difference is None:
        return f"{what}, not the run's"
    return f"{what}, at most {each.largest_difference:.1e} away, {each.ties} comparisons of equals otherwise"
