"""The questions whose answer changed, and what subjects and categories lost."""

from collections.abc import Mapping

import numpy as np

from qeval.report import measure_items
from qeval.report.explain.model import Changed, GroupLoss, TaskLoss, Went
from qeval.report.model import GroupScore
from qeval.report.pairing import BASELINE, ItemRows, Mask
from qeval.stats.bootstrap import Floats
from qeval.stats.flips import holm, mcnemar
from qeval.store.run import TaskRecord
from qeval.store.texts import QuestionText

_WENT: tuple[Went, ...] = ("right_to_wrong", "wrong_to_right", "wrong_to_other")
Questions = Mapping[tuple[str, int], QuestionText]


def changed(record: TaskRecord, rows: ItemRows, baseline: ItemRows, texts: Questions) -> list[Changed]:
    """Every answer that changed, the largest loss of the right choice's probability first."""
    went = measure_items.transitions(rows, baseline)
    p, q = (np.exp(measure_items.log_softmax(side)) for side in (baseline, rows))
    starts, ends = baseline.starts, np.append(baseline.starts[1:], len(baseline.choices))
    found = [
        _changed(record, (rows, baseline), (p[starts[at] : ends[at]], q[starts[at] : ends[at]]), at, kind, texts)
        for kind in _WENT
        for at in np.flatnonzero(went[kind]).tolist()
    ]
    return sorted(found, key=lambda one: (one.gold_change, one.subject, one.item))


def task_loss(record: TaskRecord, rows: ItemRows, baseline: ItemRows, seed: int, found: list[Changed]) -> TaskLoss:
    """A task taken apart for one variant; `found` are its changed answers. All rows must be finite."""
    name = record.name
    before = measure_items.accuracies(name, baseline, seed)[f"{name}_acc"]
    results = measure_items.results(record, {BASELINE: baseline, "variant": rows}, BASELINE, seed)
    guess = measure_items.chance(baseline)
    masks = measure_items.group_masks(record, baseline)
    groups = {
        what: _groups(
            getattr(results[BASELINE], what), getattr(results["variant"], what), masks[what], (rows, baseline)
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
        flips=measure_items.flips(rows, baseline),
        changed=found,
        subjects=groups["by_subject"] if len(record.subjects) > 1 else [],
        categories=groups["by_category"] if record.categories else [],
    )


def _groups(
    baseline: dict[str, GroupScore], variant: dict[str, GroupScore], masks: dict[str, Mask], pair: tuple[ItemRows, ...]
) -> list[GroupLoss]:
    """Subjects or categories, the largest loss of accuracy first, then the most KL over the choices."""
    rows, before = pair
    went, kl, chances = (
        measure_items.transitions(rows, before),
        measure_items.choice_kl_nats(rows, before),
        1 / before.counts(),
    )
    flips = {
        name: tuple(int((went[kind] & chosen).sum()) for kind in ("right_to_wrong", "wrong_to_right"))
        for name, chosen in masks.items()
    }
    values = {name: mcnemar(*counts) for name, counts in flips.items()}
    adjusted = dict(zip(values, holm(list(values.values())), strict=True))
    found = [
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
    return sorted(found, key=_by_loss)


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
) -> Changed:
    """One answer; `probabilities` are the baseline's and the variant's over the choices, [choices] each."""
    rows, baseline = pair
    p, q = probabilities
    subject, item, gold = str(baseline.subjects[at]), int(baseline.items[at]), int(baseline.gold[at])
    first_two = sorted(p.tolist(), reverse=True)[:2]
    text = texts.get((subject, item))
    return Changed(
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
