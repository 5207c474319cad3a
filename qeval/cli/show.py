"""What a person sees before and after a run."""

from pathlib import Path

import typer
from rich.console import Console

from qeval.cli.printing import plan_table, stdout
from qeval.compare.prepare import Plan
from qeval.compare.run import estimate
from qeval.report import Report, report_json, summary_table, words
from qeval.store.run import RunRecord


def show_plan(plan: Plan, console: Console) -> None:
    """Model, variants, tasks, tokens, and an estimate of time and memory."""
    cost = estimate(plan)
    table = plan_table()
    table.add_row(
        "model", f"{plan.model.name} ({plan.model.architecture}, {plan.model.parameters / 1e6:.0f} M weights)"
    )
    if plan.model.hub_id:
        table.add_row("from", f"{plan.model.hub_id} at commit {str(plan.model.revision)[:12]}")
    for place in plan.places:
        if place.hub:
            table.add_row(place.name, f"from {place.hub}")
    table.add_row("baseline", f"{plan.model.weight_dtype} weights computed in {plan.model.compute_dtype}")
    names = [recipe.name for recipe in plan.settings.recipes] + [entry.name for entry in plan.given]
    table.add_row("variants", ", ".join(names))
    if plan.protocol:
        p = plan.protocol
        table.add_row("corpus", f"{p.name}: {p.windows} of {p.windows_available} windows, {plan.corpus_tokens} tokens")
        table.add_row("convention", f"{p.convention}; {words.bos(p)}")
    for task in plan.tasks:
        table.add_row("questions", f"{task.title}: {task.items} in {len(task.subjects)} subjects")
    table.add_row("estimate", f"about {_duration(cost.seconds)} from nothing, {cost.peak_bytes / 2**30:.1f} GiB")
    table.add_row("report", str(plan.settings.out))
    console.print(table, highlight=False)


def show_result(record: RunRecord, report: Report, page: Path, console: Console, *, as_json: bool) -> None:
    """The final table, what the run took and where the report lies; with `as_json` the report, on stdout."""
    if as_json:
        typer.echo(report_json(report))
        return
    stdout().print(summary_table(report))
    took = f"took {_duration(record.seconds)}, peak memory {record.peak_rss_bytes / 2**30:.2f} GiB"
    console.print(f"report: {page} ({took})", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes else f"{max(1, round(seconds))} s"
