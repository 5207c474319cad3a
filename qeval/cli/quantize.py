"""`qeval quantize`: one variant of a model, on disk."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.compare import slug
from qeval.cli.progress import ConsoleProgress
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.config import parse_method


def quantize(
    model: options.Model,
    method: Annotated[str, typer.Option("--method", help="One method; see `qeval methods`.")],
    revision: options.Revision = None,
    device: options.Device = "cpu",
    compute: options.Compute = None,
    stream: options.Stream = False,
    max_memory: options.MaxMemory = None,
    calibration: options.Calibration = "pydoc",
    calibration_samples: options.CalibrationSamples = 16,
    calibration_length: options.CalibrationLength = 512,
    budget: options.Budget = None,
    importance: options.Importance = "measured",
    quantize_head: options.QuantizeHead = False,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize a model one way and write the variant: packed integers, scales, zero points, manifest."""
    del debug  # read by the program's own error handler
    defaults = options.defaults(budget, importance, quantize_head)
    recipe = parse_method(method, defaults)
    options.check_used(defaults, [recipe])
    folder = out or Path("variants") / f"{slug(model)}-{slug(method)}"
    console = Console(stderr=True)
    from qeval.compare.quantize import make_variant  # noqa: PLC0415 - torch takes seconds to import

    manifest = make_variant(
        ModelChoice(model, revision, device, options.compute_type(compute), stream, options.size_bytes(max_memory)),
        recipe,
        CalibrationChoice(calibration, calibration_samples, calibration_length),
        folder,
        threads=threads,
        seed=seed,
        progress=ConsoleProgress(console, quiet=quiet),
    )
    if as_json:
        typer.echo(manifest.model_dump_json(indent=1))
    elif not quiet:
        console.print(
            f"{recipe.name}: {len(manifest.weights)} matrices quantized, {len(manifest.kept)} weights kept in float, "
            f"{manifest.bits_per_weight:.3f} bits per weight, {manifest.size_bytes / 1e6:.1f} MB in {folder}",
            highlight=False,
            soft_wrap=True,
        )
