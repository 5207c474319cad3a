"""Show a person a run's plan before it, and its results after it."""

from pathlib import Path

from rich.console import Console

from qeval.cli.printing import plan_table, print_json, stdout
from qeval.compare.plan import Plan
from qeval.compare.run import estimate
from qeval.models.device import device_in_words
from qeval.models.device_map import placement_in_words
from qeval.report import Report, formatting, report_json, summary_table
from qeval.report.published_figures import published_warnings
from qeval.store.run import RunRecord


def show_plan(plan: Plan, console: Console) -> None:
    """Print model, variants, tasks, tokens, and an estimate of time and memory."""
    cost = estimate(plan)
    table = plan_table()
    table.add_row(
        "model", f"{plan.model.name} ({plan.model.architecture}, {formatting.count(plan.model.parameters)} weights)"
    )
    if plan.model.hub_id:
        table.add_row("from", f"{plan.model.hub_id} at commit {str(plan.model.revision)[:12]}")
    for place in plan.places:
        if place.hub:
            table.add_row(place.name, f"from {place.hub}")
    spread = placement_in_words(plan.source.model, plan.source.description.layers)
    table.add_row("device", spread or device_in_words(plan.settings.model.device))
    if plan.settings.worker_count > 1:
        on = ", one on each GPU" if plan.settings.model.device == "cuda" else ""
        table.add_row("workers", f"{plan.settings.worker_count}{on} (--workers)")
    table.add_row("baseline", f"{plan.model.weight_dtype} weights computed in {plan.model.compute_dtype}")
    if near := plan.near_the_floor:
        table.add_row(
            "precision",
            f"{', '.join(near)}: losses of 8 bits come near the noise of {plan.model.compute_dtype}, which "
            "baseline@fp32 shows; --compute fp32 has none",
        )
    names = [recipe.name for recipe in plan.settings.every_recipe] + [entry.name for entry in plan.given]
    table.add_row("variants", ", ".join(names))
    if plan.protocol:
        p = plan.protocol
        table.add_row("corpus", f"{p.name}: {p.windows} of {p.windows_available} windows, {plan.corpus_tokens} tokens")
        table.add_row("convention", f"{p.convention}; {formatting.bos(p)}")
    for task in plan.tasks:
        table.add_row("questions", f"{task.title}: {task.items} in {len(task.subjects)} subjects")
    if plan.needle:
        lengths = ", ".join(f"{length:,}" for length in plan.needle.lengths)
        table.add_row(
            "needles", f"at {len(plan.needle.depths)} depths of {len(plan.haystacks)} haystacks of {lengths} tokens"
        )
    if any(recipe.calibrated for recipe in plan.settings.every_recipe):
        seen = plan.settings.calibration
        table.add_row("calibration", f"{seen.source}: {seen.samples} x {seen.length} tokens")
    memory = f"{cost.peak_bytes / 2**30:.1f} GiB"
    if cost.gpu_bytes:
        memory = f"{cost.gpu_bytes / 2**30:.1f} GiB of the GPU{'s' if spread else ''}, {memory} of the host"
    table.add_row("estimate", f"about {_duration(cost.seconds)} from nothing, {memory}")
    table.add_row("report", str(plan.settings.out))
    console.print(table)


def show_result(record: RunRecord, report: Report, page: Path, console: Console, *, as_json: bool) -> None:
    """Print the final table, what the run took and where the report lies; with `as_json` the report, on stdout."""
    if as_json:
        print_json(report_json(report))
        return
    stdout().print(summary_table(report))
    for warning in published_warnings(report):
        console.print(f"warning: {warning}", soft_wrap=True)
    took = f"took {_duration(record.seconds)}, peak memory {record.peak_rss_bytes / 2**30:.2f} GiB"
    if gpu := record.environment.peak_gpu_bytes:
        took += f", of the GPU {gpu / 2**30:.2f} GiB"
    console.print(f"report: {page} ({took})", soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes else f"{max(1, round(seconds))} s"
