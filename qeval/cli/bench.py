"""`qeval bench`: what quantization buys, engine by engine: latency, throughput, memory."""

from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from qeval.api import benchmark
from qeval.bench.settings import BenchChoice, PageChoice
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import plan_table, print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.defaults import HubChoice
from qeval.compare.recipe_choice import RecipeChoice

if TYPE_CHECKING:
    from qeval.bench.plan import BenchPlan
    from qeval.results import BenchRun

_WIDTH = 170


@with_flags_of(
    benchmark.bench,
    trees=(BenchChoice, RecipeChoice, HubChoice, PageChoice),
    methods="Comma-separated: fp32, fp16 or bf16, the model itself, and `qeval methods`.",
)
def bench(call: CommandCall) -> int:
    """Time each variant in each engine by batch size and prompt length, and measure its memory.

    A cell is repeated until the interval of its medians is within 3 % or the budget is spent. The same command again
    adds what is missing.
    """
    console = stderr()
    run = benchmark.bench(
        **call.values,
        progress=ConsoleProgress(console, quiet=call.quiet),
        on_plan=None if call.quiet else partial(_show_plan, console=console),
        on_record=partial(_show_record, as_json=call.as_json),
        command=call.line,
    )
    if run.page is not None:
        console.print(f"report: {run.page} (took {run.record.seconds:.0f} s)", soft_wrap=True)
    from qeval.bench.run import bench_exit_code  # noqa: PLC0415 - torch takes seconds to import

    return bench_exit_code(run.record)


def _show_record(run: "BenchRun", *, as_json: bool) -> None:
    """Print what was measured, before the page is made of it."""
    from qeval.bench.summary import bench_summary_table  # noqa: PLC0415 - the statistics take a second to import

    if as_json:
        print_json(run.record.model_dump_json(indent=1))
    else:
        stdout(_WIDTH).print(bench_summary_table(run.folder, run.record))


def _show_plan(plan: "BenchPlan", console: Console) -> None:
    """Print what will be run, and how long it may take."""
    from qeval.models.device import device_in_words  # noqa: PLC0415 - torch takes seconds to import
    from qeval.report import formatting  # noqa: PLC0415

    choice, settings = plan.choice, plan.record.settings
    table = plan_table()
    table.add_row("model", f"{plan.record.model.name} ({formatting.count(plan.record.model.parameters)} weights)")
    table.add_row("engines", ", ".join(choice.engines))
    table.add_row("variants", ", ".join(choice.variant_names))
    cells = f"batch {_listed(choice.batches)} x prompt {_listed(choice.prompts)}, {choice.generate} tokens generated"
    table.add_row("grid", f"{len(plan.places)} cells: {cells}")
    where = "" if settings.device == settings.provider else f", ONNX Runtime on {settings.provider}"
    table.add_row("device", f"{device_in_words(settings.device)}, {settings.threads} threads{where}")
    table.add_row("prompts", f"passages of {settings.corpus}")
    table.add_row("budget", f"{choice.budget_seconds:.0f} s, at most {choice.repeats} runs a cell")
    table.add_row("records", str(choice.out))
    console.print(table)


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(str(number) for number in numbers)
