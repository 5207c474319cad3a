"""`qeval sensitivity`: which layer hurts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.compare import slug
from qeval.cli.printing import stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.config import parse_budget, parse_method

_SHOWN = 20


def sensitivity(
    model: options.Model,
    method: Annotated[str, typer.Option("--method", help="rtn or awq, with any grid, such as rtn:int4-g32.")] = "rtn",
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Sizes of a mix, such as 4.5,4.8,5.5bpw. Default: five in between.")
    ] = None,
    revision: options.Revision = None,
    device: options.Device = "cpu",
    compute: options.Compute = None,
    calibration: options.Calibration = "pydoc",
    calibration_samples: options.CalibrationSamples = 16,
    calibration_length: options.CalibrationLength = 512,
    measured_samples: Annotated[
        int, typer.Option("--measured-samples", min=1, help="Calibration sequences that each KL is measured on.")
    ] = 10,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure each group of linears alone quantized and left in float, map them, and list what a mix would pick.

    The same command goes on where it stopped.
    """
    del debug  # read by the program's own error handler
    from qeval.compare.sensitivity import measure_sensitivity  # noqa: PLC0415 - torch takes seconds to import
    from qeval.report.console import terminal_table  # noqa: PLC0415
    from qeval.report.sensitivity import groups_table, sensitivity_json, verdict, write_sensitivity  # noqa: PLC0415

    folder = out or Path("reports") / f"{slug(model)}-sensitivity"
    console = Console(stderr=True)
    found = measure_sensitivity(
        ModelChoice(model, revision, device, options.compute_type(compute)),
        parse_method(method),
        CalibrationChoice(calibration, calibration_samples, calibration_length),
        [parse_budget(each, "--budgets") for each in (budgets or "").split(",") if each.strip()],
        folder,
        measured_on=measured_samples,
        threads=threads,
        seed=seed,
        progress=ConsoleProgress(console, quiet=quiet),
    )
    page = write_sensitivity(found, folder)
    if as_json:
        typer.echo(sensitivity_json(found))
        return
    stdout().print(terminal_table(groups_table(found, _SHOWN)))
    stdout().print(verdict(found), highlight=False, soft_wrap=True)
    if not quiet:
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
