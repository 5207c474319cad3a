"""The questions whose answer changed, and what subjects and categories lost."""

from collections.abc import Mapping

import numpy as np

from qeval.report import measure_items
from qeval.report.align import BASELINE_NAME, ItemRows, Mask
from qeval.report.explain.model import ChangedQuestion, GroupLoss, TaskLoss, Went
from qeval.report.model import GroupScore
from qeval.stats.bootstrap import Floats
from qeval.stats.flips import holm, mcnemar
from qeval.store.run import TaskRecord
from qeval.store.texts import QuestionText

_WENT: tuple[Went, ...] = ("right_to_wrong", "wrong_to_right", "wrong_to_other")
Questions = Mapping[tuple[str, int], QuestionText]


def changed_questions(
    record: TaskRecord, rows: ItemRows, baseline: ItemRows, texts: Questions
) -> list[ChangedQuestion]:
    """Return every answer that changed, the largest loss of the right choice's probability first."""
    went = measure_items.transitions(rows, baseline)
    p, q = (np.exp(measure_items.log_softmax_rows(side)) for side in (baseline, rows))
    starts, ends = baseline.starts, np.append(baseline.starts[1:], len(baseline.choices))
    questions = [
        _changed(record, (rows, baseline), (p[starts[at] : ends[at]], q[starts[at] : ends[at]]), at, kind, texts)
        for kind in _WENT
        for at in np.flatnonzero(went[kind]).tolist()
    ]
    return sorted(questions, key=lambda one: (one.gold_change, one.subject, one.item))


def task_loss(
    record: TaskRecord, rows: ItemRows, baseline: ItemRows, seed: int, changes: list[ChangedQuestion]
) -> TaskLoss:
    """Return a task taken apart for one variant; `changes` are its changed answers. All rows must be finite."""
    name = record.name
    before = measure_items.accuracies(name, baseline, seed)[f"{name}_acc"]
    results = measure_items.results(record, {BASELINE_NAME: baseline, "variant": rows}, BASELINE_NAME, seed)
    guess = measure_items.chance(baseline)

    masks = measure_items.group_masks(record, baseline)
    groups = {
        what: _groups(
            getattr(results[BASELINE_NAME], what), getattr(results["variant"], what), masks[what], (rows, baseline)
        )
        for what in ("by_subject", "by_category")
    }

    return TaskLoss(
        name=name,
        title=record.title,
        questions=record.items,
        chance=guess,
        baseline_at_chance=measure_items.at_chance(before, guess),
        baseline=before,
        variant=measure_items.accuracies(name, rows, seed)[f"{name}_acc"],
        difference=measure_items.changes(name, rows, baseline, seed)[f"{name}_acc_diff"],
        flips=measure_items.count_flips(rows, baseline),
        changed=changes,
        subjects=groups["by_subject"] if len(record.subjects) > 1 else [],
        categories=groups["by_category"] if record.categories else [],
    )


def _groups(
    baseline: dict[str, GroupScore], variant: dict[str, GroupScore], masks: dict[str, Mask], pair: tuple[ItemRows, ...]
) -> list[GroupLoss]:
    """Return subjects or categories, the largest loss of accuracy first, then the most KL over the choices."""
    rows, before = pair
    went, kl, chances = (
        measure_items.transitions(rows, before),
        measure_items.choice_kl_nats(rows, before),
        1 / before.counts(),
    )

    # a test of the flips in each group, corrected for their number
    flips = {
        name: tuple(int((went[kind] & chosen).sum()) for kind in ("right_to_wrong", "wrong_to_right"))
        for name, chosen in masks.items()
    }
    values = {name: mcnemar(*counts) for name, counts in flips.items()}
    adjusted = dict(zip(values, holm(list(values.values())), strict=True))

    losses = [
        GroupLoss(
            name=name,
            questions=int(chosen.sum()),
            baseline=baseline[name].acc,
            variant=variant[name].acc,
            difference=variant[name].difference,
            baseline_at_chance=measure_items.at_chance(baseline[name].acc, float(chances[chosen].mean())),
            right_to_wrong=flips[name][0],
            wrong_to_right=flips[name][1],
            choice_kl_nats=float(kl[chosen].mean()),
            p_value=values[name],
            p_adjusted=adjusted[name],
        )
        for name, chosen in masks.items()
    ]
    return sorted(losses, key=_by_loss)


def _by_loss(group: GroupLoss) -> tuple[float, float]:
    difference = group.difference.value if group.difference and group.difference.value is not None else 0.0
    return difference, -group.choice_kl_nats


def _changed(
    record: TaskRecord,
    pair: tuple[ItemRows, ItemRows],
    probabilities: tuple[Floats, Floats],
    at: int,
    went: Went,
    texts: Questions,
) -> ChangedQuestion:
    """Return one answer; `probabilities` are the baseline's and the variant's over the choices, [choices] each."""
    rows, baseline = pair
    p, q = probabilities
    subject, item, gold = str(baseline.subjects[at]), int(baseline.items[at]), int(baseline.gold[at])
    first_two = sorted(p.tolist(), reverse=True)[:2]
    text = texts.get((subject, item))
    return ChangedQuestion(
        subject=subject,
        category=record.categories.get(subject),
        item=item,
        went=went,
        gold=gold,
        baseline_answer=int(baseline.pred[at]),
        variant_answer=int(rows.pred[at]),
        baseline_probabilities=p.tolist(),
        variant_probabilities=q.tolist(),
        gold_change=float(q[gold] - p[gold]),
        baseline_margin=first_two[0] - first_two[-1],
        question=None if text is None else text.question,
        choices=None if text is None else list(text.choices),
    )
