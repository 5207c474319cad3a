"""`qeval compare`: variants of a model against its baseline, and a report."""

from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from qeval.api import comparison
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import stderr
from qeval.cli.progress import ConsoleProgress
from qeval.compare.defaults import HubChoice
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import Settings
from qeval.errors import QevalError

if TYPE_CHECKING:
    from qeval.compare.plan import Plan
    from qeval.results import Run


@with_flags_of(comparison.compare, trees=(Settings, RecipeChoice, HubChoice))
def compare(call: CommandCall) -> int:
    """Quantize a model each way, score every variant against the baseline, and write a report."""
    console = stderr()
    run = comparison.compare(
        **call.values,
        progress=ConsoleProgress(console, quiet=call.quiet),
        on_plan=None if call.quiet else partial(print_plan, console=console),
        command=call.line,
    )
    print_result(run, console, as_json=call.as_json)
    return QevalError.exit_code if run.failed else 0


def print_plan(plan: "Plan", console: Console) -> None:
    """Print what will be done: model, variants, tasks, and an estimate of time and memory."""
    from qeval.cli.show import show_plan  # noqa: PLC0415 - torch takes seconds to import

    show_plan(plan, console)


def print_result(run: "Run", console: Console, *, as_json: bool) -> None:
    """Print a run's table, what it took and where its report lies; with `as_json` the report."""
    from qeval.cli.show import show_result  # noqa: PLC0415 - torch takes seconds to import

    show_result(run.record, run.report, run.page, console, as_json=as_json)
