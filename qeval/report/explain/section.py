"""The report's section about single rows: what changed, in tables that a page can sort and search."""

from collections.abc import Iterator

from qeval.report import formatting
from qeval.report.document import Section, Table, TableCell, metric_cell
from qeval.report.explain import tables
from qeval.report.explain.answers import answers_table, changed_answers
from qeval.report.explain.build import Highlights
from qeval.report.explain.model import ChangedQuestion
from qeval.report.measure_items import at_chance as is_at_chance
from qeval.report.model import Report, Task, VariantReport
from qeval.report.notes import at_chance_note
from qeval.report.tables import group_scores

TOKENS_SHOWN = 25
_CHANGED_SHOWN = 100
"""Rows of each variant in the page's tables; `qeval explain` has them all."""


def rows_section(report: Report, rows: list[Highlights]) -> Section | None:
    """Return the tables over all variants; None where there is nothing to show."""
    parts = [table for task in report.tasks for table in _task(report, task, rows)]
    losses = [(each.variant, loss) for each in rows for loss in each.answers]
    parts += [answers_table(title, each[:_CHANGED_SHOWN]) for title, each in changed_answers(losses).items()]
    parts += _tokens(rows)
    layers = [(each.variant, each.layers) for each in rows if each.layers]
    parts += [tables.layers_table(layers)] if layers else []
    if not parts:
        return None
    return Section(id="rows", title="Which rows", sentences=tuple(_sentences(report)), tables=tuple(parts))


def _sentences(report: Report) -> Iterator[str]:
    yield (
        f"The answers that changed (at most {_CHANGED_SHOWN} of each variant), the {TOKENS_SHOWN} tokens of each with "
        "the largest KL, categories, subjects and layers. The command qeval explain RUN VARIANT lists all of one."
    )
    yield from (at_chance_note(task) for task in report.tasks if task.baseline_at_chance)


def _task(report: Report, task: Task, rows: list[Highlights]) -> Iterator[Table]:
    changed = [(each.variant, one) for each in rows for one in _worst(each.changed.get(task.record.name, []))]
    if changed:
        changed.sort(key=lambda pair: pair[1].gold_change)
        total = sum(len(each.changed[task.record.name]) for each in rows)
        yield tables.changed_table(task.record.title, changed, total=total)
    if rows and task.record.categories:
        yield _groups(report, task, "category")
    if rows and len(task.record.subjects) > 1:
        yield _groups(report, task, "subject")


def _worst(changed: list[ChangedQuestion]) -> list[ChangedQuestion]:
    """Return as many as are shown; the flips before what went from one wrong answer to another."""
    flips = [one for one in changed if one.went != "wrong_to_other"]
    others = [one for one in changed if one.went == "wrong_to_other"]
    return [*flips, *others][:_CHANGED_SHOWN]


def _tokens(rows: list[Highlights]) -> list[Table]:
    shares = [(each.variant, each.tokens) for each in rows if each.tokens]
    if not shares:
        return []
    worst = [(name, token) for name, tokens in shares for token in tokens.worst]
    worst.sort(key=lambda pair: -pair[1].kl_nats)
    return [
        tables.worst_shares(shares),
        tables.tokens_table(worst, total=sum(tokens.positions for _, tokens in shares)),
    ]


def _groups(report: Report, task: Task, what: str) -> Table:
    """Return every subject or category of every variant by loss of accuracy, from what the report holds already."""
    variants = [variant for variant in report.variants if variant.role == "variant"]
    losses = [(loss, row) for variant in variants for loss, row in _of_variant(report, task, variant, what)]
    plural = {"category": "categories", "subject": "subjects"}[what]
    count = len({row[0].text for _, row in losses})
    note = (
        f"{count} {plural} are scanned here, so the worst of them looks bad by chance: the command qeval explain has a "
        "test that knows how many there are."
    )
    return Table(
        f"{task.record.title}: {plural} by loss",
        (what.capitalize(), "Variant", "Questions", "Baseline", "Variant's accuracy", "Difference"),
        tuple(row for _, row in sorted(losses, key=lambda pair: pair[0])),
        note,
        live=True,
        filters=(1,),
    )


def _of_variant(
    report: Report, task: Task, variant: VariantReport, what: str
) -> Iterator[tuple[float, tuple[TableCell, ...]]]:
    base = group_scores(report.baseline, task.record.name, what)
    word = formatting.category if what == "category" else formatting.subject
    for name, score in group_scores(variant, task.record.name, what).items():
        loss = 0.0 if score.difference is None or score.difference.value is None else score.difference.value
        remark = "at chance" if is_at_chance(base[name].acc, task.chance) else None
        yield (
            loss,
            (
                TableCell(word(name)),
                TableCell(variant.name),
                TableCell(str(score.acc.n)),
                metric_cell(base[name].acc, remark=remark),
                metric_cell(score.acc),
                metric_cell(score.difference, signed=True),
            ),
        )
