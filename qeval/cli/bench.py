"""`qeval bench`: what quantization buys, engine by engine: latency, throughput, memory."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.compare import named_path, names, slug
from qeval.cli.printing import plan_table, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.settings import CalibrationChoice, ModelChoice

if TYPE_CHECKING:
    from qeval.bench.plan import Plan
    from qeval.bench.settings import BenchChoice

_GENERATED, _GENERATED_ON_CPU = 256, 32
_WIDTH = 170


def bench(
    context: typer.Context,
    model: options.Model,
    revision: options.Revision = None,
    methods: Annotated[
        str,
        typer.Option("--methods", help="Comma-separated: fp32, fp16 or bf16, the model itself, and `qeval methods`."),
    ] = "fp32,rtn",
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="NAME=PATH: a variant, an ONNX folder or a GGUF file; may be repeated."),
    ] = None,
    engines: Annotated[
        str,
        typer.Option(
            "--engines",
            help="Comma-separated: onnxruntime, onnxruntime-genai, pytorch-eager, pytorch-compile, llama.cpp.",
        ),
    ] = "onnxruntime,pytorch-eager",
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, comma-separated.")] = "1",
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt lengths in tokens, comma-separated.")] = "16,256,1024",
    generate: Annotated[
        int | None,
        typer.Option("--generate", help="Tokens generated after each prompt; default: 256, on a CPU 32."),
    ] = None,
    ep: Annotated[
        str | None, typer.Option("--ep", help="ONNX Runtime's provider; default: cuda where --device is, else cpu.")
    ] = None,
    accuracy_level: Annotated[
        int, typer.Option("--accuracy-level", help="ONNX Runtime's: 1, fp32 activations; 4, int8 in the product.")
    ] = 4,
    device: options.Device = "cpu",
    calibration: options.Calibration = "pydoc",
    calibration_samples: options.CalibrationSamples = 16,
    calibration_length: options.CalibrationLength = 512,
    budget: options.Budget = None,
    importance: options.Importance = "measured",
    quantize_head: options.QuantizeHead = False,
    corpus: Annotated[str, typer.Option("--corpus", help="What prompts are cut from: pydoc, wikitext2, a file.")] = (
        "pydoc"
    ),
    threads: options.Threads = None,
    time_budget: Annotated[
        float, typer.Option("--time-budget", help="Seconds for the whole command; what it leaves out is said.")
    ] = 540.0,
    repeats: Annotated[int, typer.Option("--repeats", help="The most that a cell is run.")] = 30,
    quality: Annotated[
        Path | None, typer.Option("--quality", help="A comparison of the same variants, to lay beside their speed.")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option("--reference", help="A published table to lay beside one's own; may be repeated."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="What 'x times' refers to: an engine, or ENGINE/VARIANT.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides the order of the engines.")] = 0,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Time each variant in each engine by batch size and prompt length, and measure its memory.

    A cell is repeated until the interval of its medians is within 3 % or the budget is spent. The same command again
    adds what is missing.
    """
    del debug  # read by the program's own error handler
    started = time.monotonic()
    from qeval.bench.settings import BenchChoice, parse_numbers, parse_variants  # noqa: PLC0415 - heavy

    on_cpu = device == "cpu"
    defaults = options.defaults(budget, importance, quantize_head)
    precisions, recipes = parse_variants(methods, defaults)
    options.check_used(defaults, recipes)
    choice = BenchChoice(
        model=ModelChoice(model, revision, device, "float32" if on_cpu else None),
        engines=names(engines),
        precisions=precisions,
        recipes=recipes,
        variants=tuple(named_path(text) for text in variant or []),
        batches=parse_numbers(batch, "--batch"),
        prompts=parse_numbers(prompt, "--prompt"),
        generate=(_GENERATED_ON_CPU if on_cpu else _GENERATED) if generate is None else generate,
        out=out or Path("reports") / f"{slug(model)}-bench",
        calibration=CalibrationChoice(calibration, calibration_samples, calibration_length),
        corpus=corpus,
        provider=ep or ("cpu" if on_cpu else "cuda"),
        accuracy_level=accuracy_level,
        threads=threads,
        budget_seconds=time_budget,
        repeats=repeats,
        seed=seed,
        command=str(context.obj),
    )
    shown = Shown(quality, tuple(reference or ()), base)
    return _run(choice, shown, started, as_json=as_json, quiet=quiet)


@dataclass(frozen=True)
class Shown:
    """What the page lays beside the run's own figures."""

    quality: Path | None
    reference: tuple[str, ...]
    base: str | None


def _run(choice: "BenchChoice", shown: Shown, started: float, *, as_json: bool, quiet: bool) -> int:
    # torch and transformers take seconds to import, which `qeval --help` need not wait for
    from qeval.bench.plan import planned  # noqa: PLC0415
    from qeval.bench.run import bench as measured  # noqa: PLC0415
    from qeval.bench.run import exit_code  # noqa: PLC0415
    from qeval.bench.summary import summary_table  # noqa: PLC0415
    from qeval.report.bench import write_bench  # noqa: PLC0415
    from qeval.report.bench.quality import losses  # noqa: PLC0415
    from qeval.report.bench.reference import read_references  # noqa: PLC0415
    from qeval.report.bench.summary import check_base  # noqa: PLC0415

    console = Console(stderr=True)
    progress = ConsoleProgress(console, quiet=quiet)
    read_references(shown.reference)  # what the page can't show is told before any work starts
    check_base(shown.base, choice.engines, choice.variant_names)
    plan = planned(choice)
    if shown.quality is not None:
        losses(shown.quality, plan.record)
    if not quiet:
        _show_plan(plan, console)
    record = measured(plan, progress, started)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        stdout(_WIDTH).print(summary_table(choice.out, record))
    if record.timings:
        page = write_bench(choice.out, quality=shown.quality, reference=shown.reference, base=shown.base)
        console.print(f"report: {page} (took {record.seconds:.0f} s)", highlight=False, soft_wrap=True)
    return exit_code(record)


def _show_plan(plan: "Plan", console: Console) -> None:
    """What will be run, and how long it may take."""
    asked, settings = plan.choice, plan.record.settings
    table = plan_table()
    table.add_row("model", f"{plan.record.model.name} ({plan.record.model.parameters / 1e6:.0f} M weights)")
    table.add_row("engines", ", ".join(asked.engines))
    table.add_row("variants", ", ".join(asked.variant_names))
    cells = f"batch {_listed(asked.batches)} x prompt {_listed(asked.prompts)}, {asked.generate} tokens generated"
    table.add_row("grid", f"{len(plan.places)} cells: {cells}")
    where = "" if settings.device == settings.provider else f", ONNX Runtime on {settings.provider}"
    table.add_row("device", f"{settings.device}, {settings.threads} threads{where}")
    table.add_row("prompts", f"passages of {settings.corpus}")
    table.add_row("budget", f"{asked.budget_seconds:.0f} s, at most {asked.repeats} runs a cell")
    table.add_row("records", str(asked.out))
    console.print(table, highlight=False)


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(str(number) for number in numbers)
