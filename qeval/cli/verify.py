"""`qeval verify`: whether a run's rows are what was written, and what the model answers."""

from typing import TYPE_CHECKING, Annotated

import typer

import qeval
from qeval.cli import options
from qeval.cli.printing import print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress

if TYPE_CHECKING:
    from qeval.jobs.verify import Derived, Verification

_WIDTH = 180


def verify(
    run: options.RunFolder,
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
    progress = ConsoleProgress(stderr(), quiet=quiet)
    verification = qeval.verify(run, sample=sample, seed=seed, progress=progress)
    if as_json:
        print_json(verification.model_dump_json(indent=1))
    else:
        _show(verification)
    return verification.exit_code


def _show(verification: "Verification") -> None:
    console = stdout(_WIDTH)
    lines = [f"checked: {what}" for what in verification.looked_at]
    lines += [f"derived: {_derived(rows)}" for rows in verification.derived]
    lines += [f"note: {note}" for note in verification.notes]
    lines += [f"differs: {problem}" for problem in verification.problems]
    lines += [f"not done: {verification.undone}"] if verification.undone else []
    verdict = {0: "verified", 1: "something differs", 3: "no rows could be computed again"}[verification.exit_code]
    for line in [*lines, f"{verification.run}: {verdict} (exit code {verification.exit_code})"]:
        console.print(line, soft_wrap=True)


def _derived(rows: "Derived") -> str:
    what = f"{rows.rows:,} rows of {rows.name} ({rows.kind})"
    if rows.identical:
        return f"{what}, the same bytes"
    if rows.largest_difference is None:
        return f"{what}, not the run's"
    return f"{what}, at most {rows.largest_difference:.1e} away, {rows.ties} comparisons of equals otherwise"
