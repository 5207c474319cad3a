"""`qeval export`: one variant of a model as an ONNX folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.compare import slug
from qeval.cli.progress import ConsoleProgress
from qeval.compare.settings import BackendChoice, CalibrationChoice, ModelChoice
from qeval.config import parse_method


def export(
    model: options.Model,
    method: Annotated[str, typer.Option("--method", help="One method (see `qeval methods`), or `float`.")],
    revision: options.Revision = None,
    ep: options.Ep = "cpu",
    exporter: options.Exporter = "auto",
    format: options.Format = "nbits",
    accuracy_level: Annotated[
        int, typer.Option("--accuracy-level", help="1: fp32 activations; 4: int8 activations, faster and less exact.")
    ] = 1,
    precision: options.Precision = None,
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
    """Quantize a model one way and write it as an ONNX folder that onnxruntime-genai loads."""
    del debug  # read by the program's own error handler
    defaults = options.defaults(budget, importance, quantize_head)
    recipe = None if method == "float" else parse_method(method, defaults)
    options.check_used(defaults, [recipe] if recipe else [])
    choice = BackendChoice(("ort",), (accuracy_level,), ep, exporter, format, precision)
    console = Console(stderr=True)
    from qeval.backends.onnx.packages import require_onnx  # noqa: PLC0415 - an extra

    require_onnx()
    from qeval.compare.export import export as write  # noqa: PLC0415 - an extra

    folder = out or Path("onnx") / f"{slug(model)}-{slug(method)}"
    manifest = write(
        ModelChoice(model, revision),
        recipe,
        CalibrationChoice(calibration, calibration_samples, calibration_length),
        choice,
        folder,
        threads=threads,
        seed=seed,
        progress=ConsoleProgress(console, quiet=quiet),
    )
    if as_json:
        typer.echo(manifest.model_dump_json(indent=1))
        return
    if quiet:
        return
    for sentence in manifest.contents:
        console.print(sentence, highlight=False, soft_wrap=True)
    if manifest.parity:
        console.print(
            f"Against the same weights in torch: mean KL {manifest.parity['kl_nats']:.1e} nats, largest logit "
            f"difference {manifest.parity['max_logit_difference']:.1e} over {manifest.parity['tokens']:.0f} tokens.",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"Not compared with torch: {manifest.parity_missing}", highlight=False, soft_wrap=True)
    console.print(f"written: {folder}", highlight=False, soft_wrap=True)
