"""`explain`: one variant's loss from a finished run's folder; `highlights`: the rows of all that the page shows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from qeval.errors import BrokenRecordError
from qeval.report import notes
from qeval.report.align import FEW_TOKEN_COLUMNS
from qeval.report.explain.answers import answers_loss
from qeval.report.explain.layers import layers_loss
from qeval.report.explain.model import AnswersLoss, ChangedQuestion, Explanation, LayersLoss, TaskLoss, TokensLoss
from qeval.report.explain.questions import changed_questions, task_loss
from qeval.report.explain.spans import worst_spans
from qeval.report.explain.tokens import tokens_loss
from qeval.report.run_rows import PairedRun
from qeval.report.soundness import not_quantized
from qeval.store.run import TaskRecord, VariantRecord
from qeval.store.texts import Texts, read_texts

TOKENS, SPANS = 100, 50
"""The number of tokens with the largest KL that are kept, and of spans."""

_NO_TEXTS = (
    "This run kept no texts of its tokens and questions, so their numbers stand for them; run the same command again, "
    "which scores nothing anew, to have them."
)
_BOUNDED = "An endpoint gives a lower bound of KL alone, so no token is told apart by its KL."
_FLOOR = "This is the baseline itself in another type or on another backend: what it shows is the noise floor, no loss."


class Highlights(NamedTuple):
    """A variant's rows for the report's page: changed answers by task, worst tokens, layers."""

    variant: str
    changed: dict[str, list[ChangedQuestion]]
    answers: list[AnswersLoss]
    tokens: TokensLoss | None
    layers: LayersLoss | None


def build_explanation(run_dir: Path, name: str) -> Explanation:
    """Return why the variant called `name` lost what it lost.

    Raises:
        UsageError: `run_dir` holds no run, or the run has no such variant.
        BrokenRecordError: the variant failed, or its rows are missing, doubled or not on the baseline's.
    """
    run = PairedRun(run_dir, FEW_TOKEN_COLUMNS)
    record, texts = run.variant(name), read_texts(run_dir)
    _require_rows(run)
    tokens = _tokens(run, record, texts, TOKENS)
    if tokens:
        spans = worst_spans(run.tokens(record), texts, SPANS)
        tokens = tokens.model_copy(update={"spans": spans})
    answers = [each for score in run.record.scores if (each := answers_loss(run, score, record, texts))]
    tasks = [loss for task in run.record.tasks if (loss := _task(run, record, task, texts)) is not None]
    return Explanation(
        schema_version=1,
        variant=name,
        role=record.role,
        backend=record.backend,
        model=run.record.model.name,
        tasks=tasks,
        answers=answers,
        tokens=tokens,
        layers=layers_loss(record.groups, tokens.mean_kl_nats if tokens else None),
        notes=_notes(run, record, tasks, texts),
    )


def highlights(run: PairedRun, tokens: int) -> list[Highlights]:
    """Return the rows of every variant that has any; `tokens` is how many of the worst are wanted of each."""
    texts = read_texts(run.folder)
    return [
        Highlights(
            variant=record.name,
            changed={task.name: _changed(run, record, task, texts) for task in run.record.tasks},
            answers=[loss for score in run.record.scores if (loss := answers_loss(run, score, record, texts))],
            tokens=(worst := _tokens(run, record, texts, tokens)),
            layers=layers_loss(record.groups, worst.mean_kl_nats if worst else None),
        )
        for record in run.done
        if record.role == "variant"
    ]


def _require_rows(run: PairedRun) -> None:
    if not (run.record.tasks or run.protocol or run.record.scores):
        raise BrokenRecordError(f"The run '{run.folder}' is empty: it scored no tokens and no questions.")


def _tokens(run: PairedRun, record: VariantRecord, texts: Texts | None, count: int) -> TokensLoss | None:
    if run.protocol is None or "kl" not in run.record.metrics:
        return None
    rows = run.tokens(record)
    if rows.is_bounded or not np.isfinite(rows.of("kl_nats")).all():
        return None
    return tokens_loss(rows, run.baseline_tokens, texts, count)


def _changed(run: PairedRun, record: VariantRecord, task: TaskRecord, texts: Texts | None) -> list[ChangedQuestion]:
    rows, baseline = run.items(task, record), run.baseline_items(task)
    if rows.non_finite().any() or baseline.non_finite().any():
        return []
    return changed_questions(task, rows, baseline, texts.task(task.name) if texts else {})


def _task(run: PairedRun, record: VariantRecord, task: TaskRecord, texts: Texts | None) -> TaskLoss | None:
    rows, baseline = run.items(task, record), run.baseline_items(task)
    if rows.non_finite().any() or baseline.non_finite().any():
        return None
    return task_loss(task, rows, baseline, run.record.seed, _changed(run, record, task, texts))


def _notes(run: PairedRun, record: VariantRecord, tasks: list[TaskLoss], texts: Texts | None) -> list[str]:
    sentences = [_FLOOR] if record.role == "floor" else []
    sentences += [notes.chance_sentence(task.title, task.chance) for task in tasks if task.baseline_at_chance]
    sentences += [_NO_TEXTS] if texts is None else []
    sentences += [_BOUNDED] if run.protocol and run.tokens(record).is_bounded else []
    sentences += [*filter(None, [run.missing_chain]), *run.repeat_notes]
    if record.role == "variant" and (reason := not_quantized(run, record)):
        sentences.append(reason)
    return sentences + _not_finite(run, record)


def _not_finite(run: PairedRun, record: VariantRecord) -> list[str]:
    """Return what is left out because some of it is NaN or infinite, counted."""
    sentences = []
    if run.protocol and "kl" in run.record.metrics:
        kl = run.tokens(record).of("kl_nats")
        sentences += _broken("Tokens", int((~np.isfinite(kl)).sum()), len(kl))
    for task in run.record.tasks:
        bad = run.items(task, record).non_finite() | run.baseline_items(task).non_finite()
        sentences += _broken(task.title, int(bad.sum()), len(bad))
    return sentences


def _broken(what: str, count: int, total: int) -> list[str]:
    return [f"{what}: {count} of {total} values are not finite, so nothing of them is shown."] if count else []
