"""The report's section about single rows: what changed, in tables that a page can sort and search."""

from collections.abc import Iterator

from qeval.report import words
from qeval.report.explain import tables
from qeval.report.explain.build import Highlights
from qeval.report.explain.model import Changed
from qeval.report.measure_items import at_chance as is_at_chance
from qeval.report.model import Report, Task, Variant
from qeval.report.notes import at_chance
from qeval.report.page import Cell, Section, Table, metric_cell

TOKENS_SHOWN = 25
_CHANGED_SHOWN = 100
"""Rows of each variant in the page's tables; `qeval explain` has them all."""


def rows_section(report: Report, rows: list[Highlights]) -> Section | None:
    """The tables over all variants; None where there is nothing to show."""
    found = [table for task in report.tasks for table in _task(report, task, rows)]
    found += _tokens(rows)
    layers = [(each.variant, each.layers) for each in rows if each.layers]
    found += [tables.layers(layers)] if layers else []
    if not found:
        return None
    return Section(id="rows", title="Which rows", sentences=tuple(_sentences(report)), tables=tuple(found))


def _sentences(report: Report) -> Iterator[str]:
    yield (
        f"The answers that changed (at most {_CHANGED_SHOWN} of each variant), the {TOKENS_SHOWN} tokens of each with "
        "the largest KL, subjects and layers. The command qeval explain RUN VARIANT lists all of one variant."
    )
    yield from (at_chance(task) for task in report.tasks if task.baseline_at_chance)


def _task(report: Report, task: Task, rows: list[Highlights]) -> Iterator[Table]:
    changed = [(each.variant, one) for each in rows for one in _worst(each.changed.get(task.record.name, []))]
    if changed:
        changed.sort(key=lambda pair: pair[1].gold_change)
        total = sum(len(each.changed[task.record.name]) for each in rows)
        yield tables.changed(task.record.title, changed, total=total)
    if len(task.record.subjects) > 1:
        yield _subjects(report, task)


def _worst(changed: list[Changed]) -> list[Changed]:
    """As many as are shown; the flips before what went from one wrong answer to another."""
    flips = [one for one in changed if one.went != "wrong_to_other"]
    others = [one for one in changed if one.went == "wrong_to_other"]
    return [*flips, *others][:_CHANGED_SHOWN]


def _tokens(rows: list[Highlights]) -> list[Table]:
    shares = [(each.variant, each.tokens) for each in rows if each.tokens]
    if not shares:
        return []
    worst = [(name, token) for name, tokens in shares for token in tokens.worst]
    worst.sort(key=lambda pair: -pair[1].kl_nats)
    return [tables.worst_shares(shares), tables.tokens(worst, total=sum(tokens.positions for _, tokens in shares))]


def _subjects(report: Report, task: Task) -> Table:
    """Every subject of every variant by loss of accuracy, from what the report holds already."""
    found = [(loss, row) for v in report.variants if v.role == "variant" for loss, row in _of_variant(report, task, v)]
    note = (
        f"{len(task.record.subjects)} subjects are scanned here, so the worst of them looks bad by chance: the "
        "command qeval explain has a test that knows how many there are."
    )
    return Table(
        f"{task.record.title}: subjects by loss",
        ("Subject", "Variant", "Questions", "Baseline", "Variant's accuracy", "Difference"),
        tuple(row for _, row in sorted(found, key=lambda pair: pair[0])),
        note,
        live=True,
        filters=(1,),
    )


def _of_variant(report: Report, task: Task, variant: Variant) -> Iterator[tuple[float, tuple[Cell, ...]]]:
    base = report.baseline.tasks[task.record.name].by_subject
    result = variant.tasks.get(task.record.name)
    for name, score in (result.by_subject if result else {}).items():
        loss = 0.0 if score.difference is None or score.difference.value is None else score.difference.value
        remark = "at chance" if is_at_chance(base[name].acc, task.chance) else None
        yield (
            loss,
            (
                Cell(words.subject(name)),
                Cell(variant.name),
                Cell(str(score.acc.n)),
                metric_cell(base[name].acc, remark=remark),
                metric_cell(score.acc),
                metric_cell(score.difference, signed=True),
            ),
        )
