"""`diff`: run B against run A, from the two finished folders alone."""

from collections.abc import Sequence
from pathlib import Path

from qeval.errors import BrokenRecordError, UsageError
from qeval.report.align import FEW_TOKEN_COLUMNS
from qeval.report.diff.check import same_questions, same_scored, same_tokens, same_weights
from qeval.report.diff.measure import DiffSide, item_differences, judged, score_difference, token_differences
from qeval.report.diff.model import AnswerChanges, ChangedMetric, Diff, Difference, VariantDiff
from qeval.report.measure_items import accuracies, at_chance, chance
from qeval.report.notes import chance_sentence
from qeval.report.run_rows import PairedRun
from qeval.report.soundness import impossible_baseline, remarks
from qeval.stats.flips import holm
from qeval.store.run import RunRecord, ScoreRecord, TaskRecord, VariantRecord

_COLUMNS = {"kl": ("kl_nats", "top1_agreement"), "ppl": ("nll",)}


def build_diff(run_a: Path, run_b: Path, names: Sequence[tuple[str, str]] = ()) -> Diff:
    """Return the same model in two runs, B against A; `names` pairs variants of A with those of B, else by equal names.

    Raises:
        UsageError: a folder holds no run, the runs can't be paired (it says what differs), or an unknown variant.
        BrokenRecordError: rows are missing, doubled or not finite, or there is nothing to compare.
    """
    a, b = (PairedRun(folder, FEW_TOKEN_COLUMNS) for folder in (run_a, run_b))
    for run in (a, b):
        if reason := impossible_baseline(run):
            raise BrokenRecordError(f"'{run.folder}': {reason}")
    same_weights(a, b)

    # what both runs measured, row by row
    columns, tasks = _shared_columns(a, b), _shared_tasks(a, b)
    scores = _shared_scores(a, b)
    if not columns and not tasks and not scores:
        raise BrokenRecordError(
            f"'{run_a}' and '{run_b}' have no metric in common ({_run_metrics(a)} and {_run_metrics(b)}), so nothing "
            "can be paired."
        )
    apart = [same_tokens(a, b)] if columns else []
    apart += [same_questions(a, b, *pair) for pair in tasks]
    for pair in scores:
        same_scored(a, b, *pair)

    pairs = _pairs(a, b, names)
    differences = [_variant(DiffSide(a, mine), DiffSide(b, other), columns, tasks, scores) for mine, other in pairs]
    return Diff(
        schema_version=1,
        a=str(run_a),
        b=str(run_b),
        model=a.record.model.name,
        changed=_changed(a.record, b.record, pairs),
        variants=_adjusted(differences),
        notes=[
            *_notes(a, b, [task for task, _ in tasks], max(apart, default=None)),
            *_left_out(a, b, pairs, tasks),
            *(_without_kl(a, b, pairs) if "kl_nats" in columns else []),
            *_of_runs(a, b),
        ],
    )


def _variant(
    a: DiffSide,
    b: DiffSide,
    columns: Sequence[str],
    tasks: Sequence[tuple[TaskRecord, TaskRecord]],
    scores: Sequence[tuple[ScoreRecord, ScoreRecord]],
) -> VariantDiff:
    if "kl_nats" in columns and _bounded([(a.run, a.variant), (b.run, b.variant)]):
        columns = [column for column in columns if column != "kl_nats"]
    differences: list[Difference] = token_differences(a, b, columns) if columns else []
    answers: list[AnswerChanges] = []
    for pair in tasks:
        items, went = item_differences(a, b, pair)
        differences += items
        answers.append(went)
    differences += [score_difference(a, b, each) for each in scores]
    return VariantDiff(a=a.variant.name, b=b.variant.name, differences=differences, answers=answers)


def _adjusted(variants: list[VariantDiff]) -> list[VariantDiff]:
    """Return the same with p-values corrected over all figures and all tests of flips, and their verdicts."""
    figures = [one for variant in variants for one in variant.differences if one.p_value is not None]
    of_figures = iter(holm([one.p_value for one in figures if one.p_value is not None]))
    of_flips = iter(holm([one.p_value for variant in variants for one in variant.answers]))
    return [
        variant.model_copy(
            update={
                "differences": [
                    one if one.p_value is None else judged(one, next(of_figures)) for one in variant.differences
                ],
                "answers": [one.model_copy(update={"p_adjusted": next(of_flips)}) for one in variant.answers],
            }
        )
        for variant in variants
    ]


def _shared_columns(a: PairedRun, b: PairedRun) -> list[str]:
    if a.protocol is None or b.protocol is None:
        return []
    shared = set(a.record.metrics) & set(b.record.metrics)
    return [column for metric, columns in _COLUMNS.items() if metric in shared for column in columns]


def _shared_tasks(a: PairedRun, b: PairedRun) -> list[tuple[TaskRecord, TaskRecord]]:
    others = {task.name: task for task in b.record.tasks}
    return [(task, others[task.name]) for task in a.record.tasks if task.name in others]


def _shared_scores(a: PairedRun, b: PairedRun) -> list[tuple[ScoreRecord, ScoreRecord]]:
    others = {score.name: score for score in b.record.scores}
    return [(score, others[score.name]) for score in a.record.scores if score.name in others]


def _pairs(a: PairedRun, b: PairedRun, names: Sequence[tuple[str, str]]) -> list[tuple[VariantRecord, VariantRecord]]:
    """Return the variants to compare: those named, else those of equal names that both runs scored."""
    if names:
        return [(a.variant(mine), b.variant(other)) for mine, other in names]
    others = {variant.name: variant for variant in b.done if variant.role == "variant"}
    pairs = [(v, others[v.name]) for v in a.done if v.role == "variant" and v.name in others]
    if not pairs:
        raise UsageError(
            f"'{a.folder}' and '{b.folder}' have no scored variant of one name ({_named(a)}; {_named(b)}); "
            "say which belong together: --variant NAME_IN_A=NAME_IN_B."
        )
    return pairs


def _changed(a: RunRecord, b: RunRecord, pairs: Sequence[tuple[VariantRecord, VariantRecord]]) -> list[ChangedMetric]:
    """Return what the two runs and the variants were made with, where it is not the same."""
    changes = [
        (what, getattr(a.environment, what), getattr(b.environment, what))
        for what in type(a.environment).model_fields
        if what != "memory_bytes"
    ]
    changes.append(("baseline", a.baseline_label, b.baseline_label))
    changes.append(("calibration", _calibration(a), _calibration(b)))
    for mine, other in pairs:
        name = mine.name if mine.name == other.name else f"{mine.name} against {other.name}"
        changes += [
            (f"{name}: {what}", getattr(mine, what), getattr(other, what))
            for what in ("backend", "method", "grid", "importance", "size_bytes", "details", "key")
        ]
    return [ChangedMetric(what=what, a=str(mine), b=str(other)) for what, mine, other in changes if mine != other]


def _calibration(record: RunRecord) -> str:
    c = record.calibration
    return "none" if c is None else f"{c.source}, {c.samples} x {c.length} tokens ({c.tokens_sha256[:12]})"


def _notes(a: PairedRun, b: PairedRun, tasks: Sequence[TaskRecord], apart: float | None) -> list[str]:
    notes = [] if apart is None else [f"The two baselines' log-likelihoods are the same within {apart:.2g} nats."]
    if not any(v.role == "floor" for run in (a, b) for v in run.done):
        notes.append(
            "Neither run measured the noise floor (the baseline against itself), so a small difference may be noise "
            "of the arithmetic."
        )
    return notes + [sentence for task in tasks for sentence in _chance(a, task)]


def _of_runs(a: PairedRun, b: PairedRun) -> list[str]:
    """Return what a reader must know of the runs: that nothing vouches for one, what repeats, what is not quantized."""
    notes = [note for run in (a, b) for note in [*filter(None, [run.missing_chain]), *run.repeat_notes, *remarks(run)]]
    return list(dict.fromkeys(notes))


def _chance(run: PairedRun, task: TaskRecord) -> list[str]:
    baseline = run.baseline_items(task)
    accuracy = accuracies(task.name, baseline, run.record.seed)[f"{task.name}_acc"]
    guess = chance(baseline)
    return [chance_sentence(task.title, guess)] if at_chance(accuracy, guess) else []


def _bounded(sides: Sequence[tuple[PairedRun, VariantRecord]]) -> list[str]:
    """Return the names of variants of whose KL there is a lower bound alone."""
    return [variant.name for run, variant in sides if run.tokens(variant).is_bounded]


def _without_kl(a: PairedRun, b: PairedRun, pairs: Sequence[tuple[VariantRecord, VariantRecord]]) -> list[str]:
    names = dict.fromkeys(name for mine, other in pairs for name in _bounded([(a, mine), (b, other)]))
    return (
        [f"KL is not compared, since an endpoint gives a lower bound of it alone: {', '.join(names)}."] if names else []
    )


def _left_out(
    a: PairedRun,
    b: PairedRun,
    pairs: Sequence[tuple[VariantRecord, VariantRecord]],
    tasks: Sequence[tuple[TaskRecord, TaskRecord]],
) -> list[str]:
    """Return what one run has and the other lacks, named."""
    notes = []
    for place, run in enumerate((a, b)):
        used = {pair[place].name for pair in pairs}
        left = [v.name for v in run.record.variants if v.role == "variant" and v.name not in used]
        left += [task.name for task in run.record.tasks if task.name not in {task.name for task, _ in tasks}]
        notes += [f"Not compared, of '{run.folder}': {', '.join(left)}."] if left else []
    return notes


def _named(run: PairedRun) -> str:
    return f"{run.folder}: {', '.join(v.name for v in run.done) or 'none'}"


def _run_metrics(run: PairedRun) -> str:
    return ", ".join(run.record.metrics) or "none"
