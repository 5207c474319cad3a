"""The answers of tasks without choices that changed, both models' texts beside each other."""

from collections.abc import Iterable, Sequence

import numpy as np

from qeval.report import formatting
from qeval.report.document import Table, TableCell
from qeval.report.explain.model import AnswersLoss, ChangedAnswer, Went
from qeval.report.explain.tables import WENT
from qeval.report.measure_scores import are_answers, count_score_flips
from qeval.report.run_rows import PairedRun
from qeval.report.score_rows import ScoreRows
from qeval.store.run import ScoreRecord, VariantRecord
from qeval.store.texts import Texts

_ORDER: tuple[Went, ...] = ("right_to_wrong", "wrong_to_right", "wrong_to_other")
_LETTERS = 300
"""Letters of a text that a table shows: its end, where answers are given."""


def answers_loss(
    run: PairedRun, record: ScoreRecord, variant: VariantRecord, texts: Texts | None
) -> AnswersLoss | None:
    """Return what changed of a score that is right or wrong; None for others, and where items were not scored."""
    rows, baseline = run.scores(record, variant), run.baseline_scores(record)
    if rows.non_finite or baseline.non_finite or not are_answers(record, rows, baseline):
        return None
    questions = texts.task(record.task.name) if texts and record.task else {}
    changed = [
        ChangedAnswer(
            subject=str(baseline.subjects[at]),
            item=str(baseline.items[at]),
            went=went,
            question=asked.question if (asked := questions.get(_key(baseline, at))) else None,
            baseline_answer=baseline.answers[at],
            variant_answer=rows.answers[at],
            baseline_response=baseline.responses[at],
            variant_response=rows.responses[at],
        )
        for went in _ORDER
        for at in _places(went, rows, baseline)
    ]
    flips = count_score_flips(rows, baseline)
    return AnswersLoss(name=record.name, title=record.title, items=record.items, flips=flips, changed=changed)


def answers_table(title: str, rows: Sequence[tuple[str | None, ChangedAnswer]], limit: int | None = None) -> Table:
    """Return the answers that changed, both models' texts side by side; each row may name its variant."""
    shown = rows[:limit]
    named = any(name is not None for name, _ in shown)
    columns = ("Item", *(["Variant"] if named else []), "Went", "Baseline", "Variant's answer", "Asked")
    cells = tuple(
        (
            TableCell(f"{formatting.subject(one.subject)} {one.item}"),
            *([TableCell(str(name))] if named else []),
            TableCell(WENT[one.went]),
            _text(one.baseline_answer, one.baseline_response),
            _text(one.variant_answer, one.variant_response),
            TableCell("" if one.question is None else _end(one.question)),
        )
        for name, one in shown
    )
    note = (
        f"{len(shown)} of {len(rows)} answers that changed, those that were right first: what the filter left of each, "
        "and the end of the text that it stands in."
    )
    return Table(f"{title}: answers that changed", columns, cells, note, live=True, filters=(1, 2) if named else (1,))


def answers_sentence(variant: str, loss: AnswersLoss) -> str:
    """Return in a sentence how many answers of a score went which way."""
    flips = loss.flips
    return (
        f"{variant}: {loss.title}: {flips.right_to_wrong} of {loss.items} answers went from right to wrong, "
        f"{flips.wrong_to_right} from wrong to right (p {flips.p:.2g}, McNemar)."
    )


def changed_answers(losses: Iterable[tuple[str, AnswersLoss]]) -> dict[str, list[tuple[str, ChangedAnswer]]]:
    """Return the changed answers of all variants by the score's title."""
    found: dict[str, list[tuple[str, ChangedAnswer]]] = {}
    for variant, loss in losses:
        found.setdefault(loss.title, []).extend((variant, one) for one in loss.changed)
    return {title: rows for title, rows in found.items() if rows}


def _places(went: Went, rows: ScoreRows, baseline: ScoreRows) -> list[int]:
    change = rows.means - baseline.means
    if went == "wrong_to_other":
        both_wrong = (rows.means == 0) & (baseline.means == 0)
        found = both_wrong & np.asarray(rows.answers != baseline.answers, np.bool_)
    else:
        found = change < 0 if went == "right_to_wrong" else change > 0
    return [int(at) for at in np.flatnonzero(found)]


def _key(rows: ScoreRows, at: int) -> tuple[str, int]:
    item = str(rows.items[at])
    return str(rows.subjects[at]), int(item) if item.isdecimal() else -1


def _text(answer: str | None, response: str | None) -> TableCell:
    """Return an answer and the text that it stands in, the answer alone where that is all of it."""
    if response is None:
        return TableCell(answer or "")
    if answer is None or answer.strip() == response.strip():
        return TableCell(_end(response))
    return TableCell(answer, remark=_end(response))


def _end(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= _LETTERS else f"… {short[-_LETTERS:]}"
