"""Measure what quantization buys, and reproduce published figures."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qeval.api.keywords import calibration_of_keywords
from qeval.api.process import call_text, torch_settings_restored
from qeval.compare import arguments as read
from qeval.compare.arguments import Names, PathLike, Variants
from qeval.compare.defaults import takes_shipped_texts
from qeval.compare.options import from_keywords
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import AUTO, ModelChoice
from qeval.progress import Logged, Progress

if TYPE_CHECKING:
    from qeval.bench.plan import BenchPlan
    from qeval.bench.settings import BenchChoice, PageChoice
    from qeval.jobs.selfcheck import CheckedRow
    from qeval.results import BenchRun

_GENERATED, _GENERATED_ON_CPU = 256, 32


def bench(
    model: str,
    *,
    revision: str | None = None,
    methods: Names = "fp32,rtn",
    variants: Variants | None = None,
    engines: Names = "onnxruntime,pytorch-eager",
    batch: str | int | Iterable[int] = "1",
    prompt: str | int | Iterable[int] = "16,256,1024",
    generate: int | None = None,
    ep: str = AUTO,
    accuracy_level: int = 4,
    device: str = AUTO,
    calibration: PathLike | None = None,
    calibration_samples: int | None = None,
    calibration_length: int = 512,
    calibrate_all_experts: bool = False,
    offline: bool = False,
    budget: str | float | None = None,
    importance: str = "measured",
    quantize_head: bool = False,
    corpus: PathLike = "pydoc",
    threads: int | None = None,
    time_budget: float = 540.0,
    repeats: int = 30,
    quality: PathLike | None = None,
    reference: Sequence[str] | None = None,
    base: str | None = None,
    seed: int = 0,
    out: PathLike | None = None,
    progress: Progress | None = None,
    on_plan: Callable[["BenchPlan"], None] | None = None,
    on_record: Callable[["BenchRun"], None] | None = None,
    command: str | None = None,
) -> "BenchRun":
    """Time each variant in each engine by batch size and prompt length, and measure its memory.

    The keywords are the flags of `qeval bench`; `compare` describes those that both have.

    Args:
        model: A name of `qeval models`, a hub id, a folder or a .gguf file.
        methods: fp32, fp16 or bf16 (the model itself), and methods.
        engines: onnxruntime, onnxruntime-genai, pytorch-eager, pytorch-compile, llama.cpp.
        batch: Batch sizes.
        prompt: Prompt lengths in tokens.
        generate: Tokens generated after each prompt; default: 256, on a CPU 32.
        time_budget: Seconds for the whole call.
        repeats: The most that a cell is run.
        quality: A comparison of the same variants, to show beside their speed.
        reference: Published tables to show beside one's own.
        base: What "x times" refers to: an engine, or ENGINE/VARIANT.
        on_plan: Called with the plan before the work starts.
        on_record: Called with what was measured before the page is made.

    Returns:
        The folder, the record, and the page; no page where nothing could be timed.

    Raises:
        UsageError: Something that was asked for is not there or does not fit.
        QevalError: Nothing could be run.
    """
    started, values = time.monotonic(), dict(locals())
    command = command or call_text(bench, values)
    from qeval.bench.settings import BenchChoice, PageChoice, parse_variants  # noqa: PLC0415 - heavy

    options = from_keywords(RecipeChoice, values)
    precisions, recipes = parse_variants(options.methods or "", options.defaults)
    options.check_used(recipes)
    text = calibration_of_keywords(values, shipped=takes_shipped_texts(str(model), offline=offline))
    progress = progress or Logged()
    from qeval.compare.hub_access import hub_access, needs_of_calibration, needs_of_text  # noqa: PLC0415 - the hub

    needs = [*needs_of_text(str(read.text_or_none(corpus))), *needs_of_calibration(text, recipes)]
    with hub_access(needs, progress, is_offline=offline), torch_settings_restored():
        from qeval.compare.machine import model_here, provider_here  # noqa: PLC0415 - torch takes seconds to import

        place = model_here(from_keywords(ModelChoice, values), progress)
        on_cpu = place.device == "cpu"
        choice = from_keywords(
            BenchChoice,
            values,
            model=replace(place, compute="float32" if on_cpu else None),
            precisions=precisions,
            recipes=recipes,
            generate=(_GENERATED_ON_CPU if on_cpu else _GENERATED) if generate is None else generate,
            out=read.path(out) if out else Path("reports") / f"{read.slug(str(model))}-bench",
            calibration=text,
            provider=provider_here(ep, place.device),
            command=command,
        )
        return _run(choice, started, progress, from_keywords(PageChoice, values), on_plan, on_record)


def _run(
    choice: "BenchChoice",
    started: float,
    progress: Progress,
    page: "PageChoice",
    on_plan: Callable[["BenchPlan"], None] | None,
    on_record: Callable[["BenchRun"], None] | None,
) -> "BenchRun":
    # torch and transformers take seconds to import
    from qeval.bench.plan import plan_benchmark  # noqa: PLC0415
    from qeval.bench.run import run_bench as run_benchmark  # noqa: PLC0415
    from qeval.report.bench import write_bench  # noqa: PLC0415
    from qeval.report.bench.quality import losses  # noqa: PLC0415
    from qeval.report.bench.reference import read_references  # noqa: PLC0415
    from qeval.report.bench.summary import check_base  # noqa: PLC0415
    from qeval.results import BenchRun  # noqa: PLC0415

    # What the page can't show is refused before any work starts.
    read_references(page.reference)
    check_base(page.base, choice.engines, choice.variant_names)
    plan = plan_benchmark(choice)
    if page.quality is not None:
        losses(page.quality, plan.record)
    if on_plan is not None:
        on_plan(plan)
    run = BenchRun(choice.out, run_benchmark(plan, progress, started), None)
    if on_record is not None:
        on_record(run)
    if not run.record.timings:
        return run
    html = write_bench(choice.out, quality=page.quality, reference=page.reference, base=page.base)
    return run._replace(page=html)


def selfcheck(
    *,
    rows: Names | None = None,
    table: PathLike | None = None,
    data: PathLike | None = None,
    mmlu_dir: PathLike | None = None,
    device: str = AUTO,
    threads: int | None = None,
    progress: Progress | None = None,
) -> "list[CheckedRow]":
    """Reproduce published figures: those that this machine reaches, with their deviations, and why not the others.

    Args:
        rows: Ids of figures, or patterns such as "demo-*"; default: all.
        table: A YAML file of figures; default: the shipped one.
        data: Folder with WikiText-2's files; default: the cache's, else the hub.
        mmlu_dir: Folder in MMLU's csv layout; default: the hub.
        device: auto, cpu, cuda, cuda:1 or mps.
        threads: CPU threads; default: all cores.
        progress: Hears of phases and warnings.

    Raises:
        UsageError: The table can't be read, or no row goes by a pattern.
    """
    from qeval.jobs.selfcheck import Where, read_runs  # noqa: PLC0415 - torch takes seconds to import
    from qeval.jobs.selfcheck import run_selfcheck as check  # noqa: PLC0415
    from qeval.models.device import resolve_device  # noqa: PLC0415

    progress, patterns = progress or Logged(), list(read.names(rows))
    runs, place = read_runs(read.path_or_none(table), patterns), resolve_device(device)
    if place.warning:
        progress.warn(place.warning)
    where = Where(read.path_or_none(data), read.path_or_none(mmlu_dir), place.name, read.few_threads(threads))
    with torch_settings_restored():
        return check(runs, where, progress)
