"""`qeval compare`: variants of a model against its baseline, and a report."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from qeval.cli import options
from qeval.cli.progress import ConsoleProgress
from qeval.compare.settings import (
    BackendChoice,
    CalibrationChoice,
    CorpusChoice,
    DriftChoice,
    ModelChoice,
    Settings,
    TaskChoice,
)
from qeval.config import load_recipes, parse_methods
from qeval.errors import UsageError

_DEFAULT_METHODS = "rtn,awq,mixed"


def compare(
    context: typer.Context,
    model: options.Model,
    revision: options.Revision = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Comma-separated; see `qeval methods`. Default: rtn,awq,mixed."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of recipes.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            help="NAME=PATH: a variant made before, an ONNX folder, a quantized checkpoint, a GGUF file; or, fetched "
            "from the hub, NAME=ORG/REPO[@REVISION][:WHAT], WHAT: a folder there, or a file or its type (Q4_K_M).",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="torch (fake-quantized weights), ort (ONNX Runtime's kernels), llama.cpp (its own, on GGUF files); "
            "or several, comma-separated.",
        ),
    ] = "torch",
    accuracy_level: Annotated[
        str, typer.Option("--accuracy-level", help="ONNX Runtime's: 1, fp32 activations; 4, int8 activations; 1,4.")
    ] = "1",
    ep: options.Ep = "cpu",
    exporter: options.Exporter = "auto",
    format: options.Format = "nbits",
    precision: options.Precision = None,
    device: options.Device = "cpu",
    compute: options.Compute = None,
    stream: options.Stream = False,
    max_memory: options.MaxMemory = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Comma-separated: kl, ppl, drift, mmlu, or any lm-eval task of choices.")
    ] = "kl,ppl,mmlu",
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="wikitext2, c4, pydoc, code, or a text file; several with commas.")
    ] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="A named protocol; see `qeval tasks`.")] = None,
    convention: Annotated[
        str | None,
        typer.Option("--convention", help="How perplexity is counted, and its windows; see `qeval tasks`."),
    ] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens a window.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Tokens between windows; equal: no overlap.")] = None,
    max_windows: Annotated[int | None, typer.Option("--max-windows", help="Only the first N windows.")] = None,
    bos: Annotated[
        Literal["auto", "always", "never"],
        typer.Option("--bos", help="BOS token; auto: as the tokenizer does."),
    ] = "auto",
    mmlu_dir: Annotated[
        Path | None,
        typer.Option("--mmlu-dir", help="Folder with dev/ and test/ in MMLU's csv layout, or 'hub'."),
    ] = None,
    subjects: Annotated[str | None, typer.Option("--subjects", help="Comma-separated MMLU subjects.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Questions a subject.")] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Examples in a prompt.")] = 5,
    drift_prompts: Annotated[int, typer.Option("--drift-prompts", min=1, help="With drift: prompts to continue.")] = 32,
    drift_prompt_tokens: Annotated[
        int, typer.Option("--drift-prompt-tokens", min=1, help="With drift: tokens of each prompt.")
    ] = 64,
    drift_tokens: Annotated[
        int, typer.Option("--drift-tokens", min=1, help="With drift: tokens that each is continued by.")
    ] = 64,
    calibration: options.Calibration = "pydoc",
    calibration_samples: options.CalibrationSamples = 16,
    calibration_length: options.CalibrationLength = 512,
    budget: options.Budget = None,
    importance: options.Importance = "measured",
    quantize_head: options.QuantizeHead = False,
    batch_tokens: Annotated[int | None, typer.Option("--batch-tokens", help="Tokens a batch.")] = None,
    threads: options.Threads = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that score, each with its share of the threads.")
    ] = 1,
    executor: Annotated[
        Literal["local", "ray"], typer.Option("--executor", help="Where workers run: this machine, or a Ray cluster.")
    ] = "local",
    worker_gpus: Annotated[
        float | None, typer.Option("--worker-gpus", help="GPUs of a Ray worker; default: 1 on --device cuda, else 0.")
    ] = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Quantize a model each way, score every variant against the baseline, and write a report."""
    del debug  # read by the program's own error handler
    defaults = options.defaults(budget, importance, quantize_head)
    recipes = load_recipes(config, defaults) if config else []
    given = tuple(named_path(text) for text in variant or [])
    if methods is not None or (not recipes and not given):
        recipes += parse_methods(methods or _DEFAULT_METHODS, defaults)
    options.check_used(defaults, recipes)
    settings = Settings(
        model=ModelChoice(
            model, revision, device, options.compute_type(compute), stream, options.size_bytes(max_memory)
        ),
        recipes=tuple(recipes),
        variants=given,
        tasks=names(tasks),
        corpus=CorpusChoice(corpus, protocol, window, stride, max_windows, bos, convention),
        questions=TaskChoice(mmlu_dir, _named_subjects(subjects), limit, shots),
        calibration=CalibrationChoice(calibration, calibration_samples, calibration_length),
        out=out or Path("reports") / slug(model),
        backends=BackendChoice(
            names(backend), options.accuracy_levels(accuracy_level), ep, exporter, format, precision
        ),
        drift=DriftChoice(drift_prompts, drift_prompt_tokens, drift_tokens),
        batch_tokens=batch_tokens,
        threads=threads,
        workers=workers,
        executor=executor,
        worker_gpus=worker_gpus,
        seed=seed,
        command=str(context.obj),
    )
    return _run(settings, as_json=as_json, quiet=quiet)


def slug(model: str) -> str:
    """A folder's name for a model's: `meta-llama/Llama-3.2-3B` -> `meta-llama--llama-3.2-3b`."""
    name = Path(model).name if Path(model).exists() else model.replace("/", "--")
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def _run(settings: Settings, *, as_json: bool, quiet: bool) -> int:
    # torch, transformers and lm-eval take seconds to import, which `qeval --help` need not wait for
    from qeval.cli.show import show_plan, show_result  # noqa: PLC0415
    from qeval.compare.prepare import prepare  # noqa: PLC0415
    from qeval.compare.run import failed, membership, run  # noqa: PLC0415
    from qeval.report import build, write  # noqa: PLC0415

    console = Console(stderr=True)
    progress = ConsoleProgress(console, quiet=quiet)
    plan = prepare(settings)
    if not quiet:
        show_plan(plan, console)
    with membership(plan, progress) as ledger:
        record = run(plan, progress, ledger)
        with progress.phase("report", 1), ledger.alone("report"):
            report = build(settings.out)
            rendered = write(report, settings.out)
    show_result(record, report, rendered.html, console, as_json=as_json)
    return 3 if failed(record.variants) else 0


def names(text: str | None) -> tuple[str, ...]:
    """The words of a comma-separated list, each once."""
    return tuple(dict.fromkeys(name for name in (part.strip() for part in (text or "").split(",")) if name))


def _named_subjects(text: str | None) -> tuple[str, ...]:
    """The subjects of --subjects; none means all of them.

    Raises:
        UsageError: it was given, and names none.
    """
    found = names(text)
    if text is not None and not found:
        raise UsageError(f"--subjects '{text}' names no subject; leave it out for all of them.")
    return found


def named_path(text: str) -> tuple[str, Path]:
    """The name and the path of NAME=FOLDER.

    Raises:
        UsageError: it is none.
    """
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise UsageError(f"--variant takes NAME=PATH, not '{text}'.")
    return name, Path(path)
