"""`qeval models`: the aliases; with --check, what works for which family; with --all, which types are scored right."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from qeval.cli import options
from qeval.cli.listing import say, show
from qeval.cli.printing import print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.errors import UsageError
from qeval.models.hub.aliases import list_models

_WIDTH = 160


def models(
    check: Annotated[
        bool, typer.Option("--check", help="Try every method, score and export on a tiny model of each family.")
    ] = False,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="With --check: score, quantize and stream a tiny model of each causal type of transformers (minutes).",
        ),
    ] = False,
    family: Annotated[
        list[str] | None, typer.Option("--family", help="With --check: this one alone; may be repeated.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """The model aliases, and what else --model takes; with --check, what works for which model family.

    Exit codes: 0 all works that can, 1 something that should work does not, 2 wrong use.
    """
    del debug  # read by the program's own error handler
    if every and (family or not check):
        raise UsageError("--all belongs to --check, and goes through all types: leave --family out.")
    if every:
        return _check_all(ConsoleProgress(stderr(), quiet=quiet), as_json=as_json)
    if check:
        return _check(family, ConsoleProgress(stderr(), quiet=quiet), as_json=as_json)
    if family:
        raise UsageError("--family belongs to --check; give both.")
    if as_json:
        print_json(json.dumps([{"alias": a, "model": m, "line": line} for a, m, line in list_models()], indent=1))
        return 0
    show("alias", ((name, f"{hub_id}: {line}") for name, hub_id, line in list_models()))
    say(
        "--model also takes a hub id such as org/name (org/name@revision; org/name:F16 or org/name:folder/file.gguf of "
        "GGUF files), a local folder, or a .gguf file."
    )
    return 0


def _check(families: list[str] | None, progress: ConsoleProgress, *, as_json: bool) -> int:
    from qeval.jobs.conformance import any_failed, check_families, matrix_markdown  # noqa: PLC0415 - torch takes seconds to import
    from qeval.models.families import FAMILIES  # noqa: PLC0415

    cells_by_family = check_families(families or list(FAMILIES), progress)
    if as_json:
        plain = {
            name: {check: asdict(cell) for check, cell in cells.items()} for name, cells in cells_by_family.items()
        }
        print_json(json.dumps(plain, indent=1))
    else:
        for line in matrix_markdown(cells_by_family):
            stdout(_WIDTH).print(line, soft_wrap=True)
    return int(any_failed(cells_by_family))


def _check_all(progress: ConsoleProgress, *, as_json: bool) -> int:
    from qeval.jobs.causal_types import any_fault, check_types, lines_of  # noqa: PLC0415 - torch takes seconds
    from qeval.models.tiny import CAUSAL_TYPES  # noqa: PLC0415

    rows = check_types(CAUSAL_TYPES, progress)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        for line in lines_of(rows):
            stdout(_WIDTH).print(line, highlight=False, markup=False, soft_wrap=True)
    return int(any_fault(rows))
