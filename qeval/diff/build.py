"""`diff`: run B against run A, from the two finished folders alone."""

from collections.abc import Sequence
from pathlib import Path

from qeval.diff.check import same_questions, same_tokens, same_weights
from qeval.diff.measure import Side, item_differences, judged, token_differences
from qeval.diff.model import AnswerChanges, Changed, Diff, Difference, VariantDiff
from qeval.errors import BrokenRecordError, UsageError
from qeval.report.measure_items import accuracies, at_chance, chance
from qeval.report.notes import chance_sentence
from qeval.report.paired import PairedRun
from qeval.report.pairing import FEW_TOKEN_COLUMNS
from qeval.stats.flips import holm
from qeval.store.run import RunRecord, TaskRecord, VariantRecord

_COLUMNS = {"kl": ("kl_nats", "top1_agreement"), "ppl": ("nll",)}


def diff(run_a: Path, run_b: Path, names: Sequence[tuple[str, str]] = ()) -> Diff:
    """The same model in two runs, B against A; `names` pairs variants of A with those of B, else by equal names.

    Raises:
        UsageError: a folder holds no run, the runs can't be paired (it says what differs), or an unknown variant.
        BrokenRecordError: rows are missing, doubled or not finite, or there is nothing to compare.
    """
    a, b = (PairedRun(folder, FEW_TOKEN_COLUMNS) for folder in (run_a, run_b))
    same_weights(a, b)
    columns, tasks = _shared_columns(a, b), _shared_tasks(a, b)
    if not columns and not tasks:
        raise BrokenRecordError(
            f"'{run_a}' and '{run_b}' have no metric in common ({_asked(a)} and {_asked(b)}), so nothing can be paired."
        )
    apart = [same_tokens(a, b)] if columns else []
    apart += [same_questions(a, b, *pair) for pair in tasks]
    pairs = _pairs(a, b, names)
    found = [_variant(Side(a, mine), Side(b, other), columns, tasks) for mine, other in pairs]
    return Diff(
        schema_version=1,
        a=str(run_a),
        b=str(run_b),
        model=a.record.model.name,
        changed=_changed(a.record, b.record, pairs),
        variants=_adjusted(found),
        notes=[*_notes(a, b, [task for task, _ in tasks], max(apart)), *_left_out(a, b, pairs, tasks)],
    )


def _variant(a: Side, b: Side, columns: Sequence[str], tasks: Sequence[tuple[TaskRecord, TaskRecord]]) -> VariantDiff:
    differences: list[Difference] = token_differences(a, b, columns) if columns else []
    answers: list[AnswerChanges] = []
    for pair in tasks:
        found, went = item_differences(a, b, pair)
        differences += found
        answers.append(went)
    return VariantDiff(a=a.variant.name, b=b.variant.name, differences=differences, answers=answers)


def _adjusted(found: list[VariantDiff]) -> list[VariantDiff]:
    """The same with p-values corrected over all figures and over all tests of flips, and the verdicts they give."""
    figures = [one for variant in found for one in variant.differences if one.p_value is not None]
    of_figures = iter(holm([one.p_value for one in figures if one.p_value is not None]))
    of_flips = iter(holm([one.p_value for variant in found for one in variant.answers]))
    return [
        variant.model_copy(
            update={
                "differences": [
                    one if one.p_value is None else judged(one, next(of_figures)) for one in variant.differences
                ],
                "answers": [one.model_copy(update={"p_adjusted": next(of_flips)}) for one in variant.answers],
            }
        )
        for variant in found
    ]


def _shared_columns(a: PairedRun, b: PairedRun) -> list[str]:
    if a.protocol is None or b.protocol is None:
        return []
    shared = set(a.record.metrics) & set(b.record.metrics)
    return [column for metric, columns in _COLUMNS.items() if metric in shared for column in columns]


def _shared_tasks(a: PairedRun, b: PairedRun) -> list[tuple[TaskRecord, TaskRecord]]:
    others = {task.name: task for task in b.record.tasks}
    return [(task, others[task.name]) for task in a.record.tasks if task.name in others]


def _pairs(a: PairedRun, b: PairedRun, names: Sequence[tuple[str, str]]) -> list[tuple[VariantRecord, VariantRecord]]:
    """The variants to compare: those named, else those of equal names that both runs scored."""
    if names:
        return [(a.variant(mine), b.variant(other)) for mine, other in names]
    others = {variant.name: variant for variant in b.done if variant.role == "variant"}
    found = [(v, others[v.name]) for v in a.done if v.role == "variant" and v.name in others]
    if not found:
        raise UsageError(
            f"'{a.folder}' and '{b.folder}' have no scored variant of one name ({_named(a)}; {_named(b)}); "
            "say which belong together: --variant NAME_IN_A=NAME_IN_B."
        )
    return found


def _changed(a: RunRecord, b: RunRecord, pairs: Sequence[tuple[VariantRecord, VariantRecord]]) -> list[Changed]:
    """What the two runs and the variants were made with, where it is not the same."""
    found = [
        (what, getattr(a.environment, what), getattr(b.environment, what))
        for what in type(a.environment).model_fields
        if what != "memory_bytes"
    ]
    found.append(("baseline", a.baseline_label, b.baseline_label))
    found.append(("calibration", _calibration(a), _calibration(b)))
    for mine, other in pairs:
        name = mine.name if mine.name == other.name else f"{mine.name} against {other.name}"
        found += [
            (f"{name}: {what}", getattr(mine, what), getattr(other, what))
            for what in ("backend", "method", "grid", "importance", "size_bytes", "details", "key")
        ]
    return [Changed(what=what, a=str(mine), b=str(other)) for what, mine, other in found if mine != other]


def _calibration(record: RunRecord) -> str:
    c = record.calibration
    return "none" if c is None else f"{c.source}, {c.samples} x {c.length} tokens ({c.tokens_sha256[:12]})"


def _notes(a: PairedRun, b: PairedRun, tasks: Sequence[TaskRecord], apart: float) -> list[str]:
    found = [f"The two baselines' log-likelihoods are the same within {apart:.2g} nats."]
    if not any(v.role == "floor" for run in (a, b) for v in run.done):
        found.append(
            "Neither run measured the noise floor (the baseline against itself), so a small difference may be noise "
            "of the arithmetic."
        )
    return found + [sentence for task in tasks for sentence in _chance(a, task)]


def _chance(run: PairedRun, task: TaskRecord) -> list[str]:
    baseline = run.baseline_items(task)
    accuracy = accuracies(task.name, baseline, run.record.seed)[f"{task.name}_acc"]
    guess = chance(baseline)
    return [chance_sentence(task.title, guess)] if at_chance(accuracy, guess) else []


def _left_out(
    a: PairedRun,
    b: PairedRun,
    pairs: Sequence[tuple[VariantRecord, VariantRecord]],
    tasks: Sequence[tuple[TaskRecord, TaskRecord]],
) -> list[str]:
    """What one run has and the other lacks, named."""
    found = []
    for place, run in enumerate((a, b)):
        used = {pair[place].name for pair in pairs}
        left = [v.name for v in run.record.variants if v.role == "variant" and v.name not in used]
        left += [task.name for task in run.record.tasks if task.name not in {task.name for task, _ in tasks}]
        found += [f"Not compared, of '{run.folder}': {', '.join(left)}."] if left else []
    return found


def _named(run: PairedRun) -> str:
    return f"{run.folder}: {', '.join(v.name for v in run.done) or 'none'}"


def _asked(run: PairedRun) -> str:
    return ", ".join(run.record.metrics) or "none"
