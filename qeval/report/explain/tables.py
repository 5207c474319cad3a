"""An explanation as tables: the same for the terminal and, over all variants, for the page."""

from collections.abc import Iterable, Sequence

from qeval import escape
from qeval.report import formatting
from qeval.report.document import NOTHING, Table, TableCell, metric_cell
from qeval.report.explain.model import (
    ChangedQuestion,
    Explanation,
    GroupLoss,
    LayersLoss,
    SpanLoss,
    TaskLoss,
    TokenLoss,
    TokensLoss,
)

_CONTEXT_LETTERS = 100
_QUESTION_LETTERS = 400
_ARROW = "\N{RIGHTWARDS ARROW}"
WENT = {
    "right_to_wrong": f"right {_ARROW} wrong",
    "wrong_to_right": f"wrong {_ARROW} right",
    "wrong_to_other": f"wrong {_ARROW} another wrong",
}


def explanation_tables(explanation: Explanation, limit: int) -> list[Table]:
    """Return everything that an explanation holds, `limit` rows of each kind at most."""
    tables = []
    for task in explanation.tasks:
        tables.append(changed_table(task.title, [(None, one) for one in task.changed], limit))
        tables += [group_losses_table(task, what, limit) for what in ("category", "subject") if _of(task, what)]
    if explanation.tokens:
        tables.append(
            tokens_table([(None, one) for one in explanation.tokens.worst], limit, total=explanation.tokens.positions)
        )
        tables += [spans_table(explanation.tokens.spans, limit)] if explanation.tokens.spans else []
    if explanation.layers:
        tables.append(layers_table([(None, explanation.layers)], limit))
    return tables


def changed_table(
    title: str, rows: Sequence[tuple[str | None, ChangedQuestion]], limit: int | None = None, total: int | None = None
) -> Table:
    """Return the answers that changed, with both models' probabilities; each row may name its variant.

    `total` says how many there are where `rows` are not all of them.
    """
    shown = rows[:limit]
    texts = any(one.question is not None for _, one in shown)
    columns = (
        "Question", *_named(rows), "Went", "Right choice", "Baseline's answer", "Variant's answer",
        "Right choice, baseline", "Right choice, variant", "Change", "Baseline's margin",
        *(["Asked"] if texts else []),
    )  # fmt: skip

    cells = tuple(
        (
            TableCell(f"{formatting.subject(one.subject)} {one.item}"),
            *_name(name),
            TableCell(WENT[one.went]),
            TableCell(formatting.letter(one.gold)),
            _answer(one.baseline_answer, one.baseline_probabilities),
            _answer(one.variant_answer, one.variant_probabilities),
            TableCell(formatting.number(one.baseline_probabilities[one.gold], 3)),
            TableCell(formatting.number(one.variant_probabilities[one.gold], 3)),
            TableCell(formatting.number(one.gold_change, 3, signed=True)),
            TableCell(formatting.number(one.baseline_margin, 3)),
            *([_question_cell(one)] if texts else []),
        )
        for name, one in shown
    )

    note = (
        f"{_of_all(len(shown), total or len(rows), 'answers that changed')}, the largest loss of the right choice "
        "first. In brackets the probability of the answer given, over the choices. The margin is the baseline's first "
        "choice above its second: where it is small, the baseline was not sure either."
    )
    return Table(f"{title}: answers that changed", columns, cells, note, live=True, filters=_filters(rows, 1))


def group_losses_table(task: TaskLoss, what: str, limit: int | None = None) -> Table:
    """Return subjects or categories by loss of accuracy, with tests of their flips corrected for their number."""
    losses = _of(task, what)
    shown, word = losses[:limit], formatting.category if what == "category" else formatting.subject
    cells = tuple(
        (
            TableCell(word(group.name)),
            TableCell(str(group.questions)),
            metric_cell(group.baseline, remark="at chance" if group.baseline_at_chance else None),
            metric_cell(group.variant),
            metric_cell(group.difference, signed=True),
            TableCell(str(group.right_to_wrong)),
            TableCell(str(group.wrong_to_right)),
            TableCell(formatting.number(group.choice_kl_nats, 4)),
            TableCell(f"{group.p_adjusted:.2g}"),
        )
        for group in shown
    )

    columns = (
        what.capitalize(), "Questions", "Baseline", "Variant", "Difference", WENT["right_to_wrong"],
        WENT["wrong_to_right"], "KL over the choices, nats", "p, adjusted",
    )  # fmt: skip
    plural = {"category": "categories", "subject": "subjects"}[what]
    note = (
        f"{_of_all(len(shown), len(losses), plural)}, the largest loss first. p: McNemar's exact test on the flips, "
        f"after Holm over all {len(losses)}, since the worst of many looks bad by chance."
    )
    return Table(f"{task.title}: {plural} by loss", columns, cells, note)


def tokens_table(rows: Sequence[tuple[str | None, TokenLoss]], limit: int | None = None, *, total: int) -> Table:
    """Return the positions with the largest KL, of `total`, in their context; each row may name its variant."""
    shown = rows[:limit]
    cells = tuple(
        (
            TableCell(f"{one.window}:{one.position}"),
            *_name(name),
            TableCell(formatting.number(one.kl_nats, 3)),
            TableCell(f"token {one.token}" if one.before is None else escape.visible(one.before, _CONTEXT_LETTERS)),
            TableCell(_next(one)),
            _probability(one.baseline_probability),
            _probability(one.variant_probability),
            TableCell("yes" if one.top1_agreement else "no"),
        )
        for name, one in shown
    )

    columns = (
        "Window:token", *_named(rows), "KL, nats", "What was read, to this token", "What follows",
        "Its probability, baseline", "Its probability, variant", "Same top token",
    )  # fmt: skip
    note = (
        f"{_of_all(len(shown), total, 'positions')}, the largest KL first. KL is that of the next token's "
        "distribution, after the text shown; probabilities are of what really follows."
    )
    return Table(
        "Tokens with the largest KL", columns, cells, note, live=True, filters=_filters(rows, len(columns) - 1)
    )


def spans_table(spans: Sequence[SpanLoss], limit: int | None = None) -> Table:
    """Return the spikes: the spans with the largest summed KL, with their text."""
    shown = spans[:limit]
    cells = tuple(
        (
            TableCell(f"{one.window}:{one.first}"),
            TableCell(str(one.last - one.first + 1)),
            TableCell(formatting.number(one.kl_nats, 3)),
            TableCell(formatting.number(one.largest_kl_nats, 3)),
            NOTHING if one.before is None else TableCell(escape.visible(one.before, _CONTEXT_LETTERS)),
            NOTHING if one.text is None else TableCell(escape.visible(one.text, _QUESTION_LETTERS)),
        )
        for one in shown
    )
    columns = (
        "Window:token",
        "Tokens",
        "KL in all, nats",
        "Largest, nats",
        "What was read before",
        "What they predict",
    )
    note = (
        f"{_of_all(len(shown), len(spans), 'spans')}, the largest sum first. A span is of positions whose KL is among "
        "the largest hundredth, with at most two others in a row between them."
    )
    return Table("Spikes: where the loss is large, tokens in a row", columns, cells, note)


def layers_table(rows: Sequence[tuple[str | None, LayersLoss]], limit: int | None = None) -> Table:
    """Return every layer's share of the damage, by kind of linear; each row may name its variant."""
    kinds = list(dict.fromkeys(kind for _, one in rows for layer in one.layers for kind in layer.kinds))
    cells = tuple(
        (
            TableCell(f"Layer {layer.layer}"),
            *_name(name),
            TableCell(formatting.percent(layer.share, 1)),
            TableCell(f"{layer.kl_nats:.3g}"),
            *(_share(layer.kinds.get(kind)) for kind in kinds),
        )
        for name, one in rows
        for layer in one.layers[:limit]
    )
    columns = ("Layer", *_named(rows), "Share", "KL alone, nats", *kinds)
    return Table("Layers by share of the damage", columns, cells, _layers_note(rows), live=True, filters=_filters(rows))


def task_sentence(task: TaskLoss) -> str:
    """Return what became of a task's accuracy and answers, in a sentence."""
    chance = " (at chance)" if task.baseline_at_chance else ""
    difference, flips = formatting.metric_text(task.difference, signed=True), task.flips
    return (
        f"{task.title}: {formatting.metric_text(task.baseline)}{chance} of the baseline and "
        f"{formatting.metric_text(task.variant)} of the variant, difference {difference}; of {task.questions} answers "
        f"{flips.right_to_wrong} went from right to wrong, {flips.wrong_to_right} from wrong to right and "
        f"{flips.wrong_to_other} from one wrong answer to another."
    )


def worst_shares(rows: Sequence[tuple[str, TokensLoss]]) -> Table:
    """Return how much of all KL the worst positions of each variant hold."""
    levels = [f"Worst {formatting.percent(level, 1 if level < 0.01 else 0)}" for level in rows[0][1].worst_levels]
    cells = tuple(
        (
            TableCell(name),
            *(TableCell(formatting.percent(share, 1)) for share in one.worst_shares),
            TableCell(str(one.positions)),
        )
        for name, one in rows
    )
    return Table("Share of all KL in the worst positions", ("Variant", *levels, "Positions"), cells)


def worst_sentence(tokens: TokensLoss) -> str:
    """Return how much of all KL the worst positions hold, in a sentence."""
    shares = [
        f"the worst {formatting.percent(level, 1 if level < 0.01 else 0)} of positions hold {formatting.percent(share)}"
        for level, share in zip(tokens.worst_levels, tokens.worst_shares, strict=True)
    ]
    return f"of the KL over {tokens.positions} positions {formatting.listed(shares)}"


def _layers_note(rows: Iterable[tuple[str | None, LayersLoss]]) -> str:
    sums = [_additivity(name, one) for name, one in rows if one.additivity is not None]
    unmeasured = sum(one.unmeasured for _, one in rows)
    missing = f" {unmeasured} groups have no KL measured at their width and count as none." if unmeasured else ""
    return (
        "Share of the KL of groups quantized alone, each at the width it was given, on the calibration text."
        + missing
        + "".join(sums)
    )


def _additivity(name: str | None, one: LayersLoss) -> str:
    whose = f"{name}'s" if name else "the variant's"
    return (
        f" They add up to {one.sum_kl_nats:.3g} nats, {one.additivity:.2g} times {whose} own mean KL: the further "
        "from 1, the less the parts say about the whole."
    )


def _of(task: TaskLoss, what: str) -> list[GroupLoss]:
    return task.categories if what == "category" else task.subjects


def _of_all(shown: int, total: int, what: str) -> str:
    return f"All {total} {what}" if shown == total else f"{shown} of {total} {what}"


def _named(rows: Sequence[tuple[str | None, object]]) -> list[str]:
    return ["Variant"] if any(name for name, _ in rows) else []


def _name(name: str | None) -> list[TableCell]:
    return [] if name is None else [TableCell(name)]


def _filters(rows: Sequence[tuple[str | None, object]], *columns: int) -> tuple[int, ...]:
    """Return the variant's column where rows name one, and further ones, which it moves by one place."""
    if not _named(rows):
        return columns
    return (1, *(column + 1 if column == 1 else column for column in columns))


def _answer(choice: int, probabilities: list[float]) -> TableCell:
    return TableCell(f"{formatting.letter(choice)} ({formatting.number(probabilities[choice], 3)})")


def _question_cell(one: ChangedQuestion) -> TableCell:
    if one.question is None:
        return NOTHING
    question = escape.visible(one.question)
    return TableCell(
        question
        if len(question) <= _QUESTION_LETTERS
        else f"{question[: _QUESTION_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    )


def _next(one: TokenLoss) -> str:
    if one.next:
        return escape.visible(one.next)
    if one.next is None and one.next_token is not None:
        return f"token {one.next_token}"
    return "the window ends" if one.next_token is None else "part of a character"


def _probability(value: float | None) -> TableCell:
    return NOTHING if value is None else TableCell(formatting.number(value, 4) if value >= 5e-5 else f"{value:.1e}")


def _share(value: float | None) -> TableCell:
    return NOTHING if value is None else TableCell(formatting.percent(value, 1))
