"""Scores of tasks without choices, or of another program, every variant's with the baseline's, item by item.

As with qeval's own rows, what is missing, doubled or other than the baseline's is an error that names it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qeval.errors import BrokenRecordError
from qeval.report.align import first_difference
from qeval.report.independent import question_clusters
from qeval.stats.bootstrap import Clusters, Floats, Ints
from qeval.stats.repeats import Components, components, item_means
from qeval.store.run import ScoreRecord


@dataclass(frozen=True, eq=False)
class ScoreRows:
    """One model's scores in the order of (subject, item, repeat).

    `subjects`, `items` and `prompts` are [items]; `values` (NaN where an item was not scored), `places` (the item of
    each score), `repeats` (counted from 0), `answers`, `responses` and `is_cut` are [scores]. The last three are texts
    and a mark of generated answers, and None elsewhere.
    """

    subjects: NDArray[np.object_]
    items: NDArray[np.object_]
    prompts: NDArray[np.object_]
    values: Floats
    places: Ints
    repeats: Ints
    answers: NDArray[np.object_]
    responses: NDArray[np.object_]
    is_cut: NDArray[np.object_]

    @property
    def cut_share(self) -> NDArray[np.float64] | None:
        """Return which responses nothing ended before their most tokens, as 0 or 1; None where that isn't known."""
        known = all(cut is not None for cut in self.is_cut)
        return self.is_cut.astype(np.float64) if known and len(self.is_cut) else None

    @cached_property
    def means(self) -> Floats:
        """Each item's mean over its repeats, [items]."""
        return item_means(self.values, self.places)

    @cached_property
    def variances(self) -> Components:
        """The variances of single scores."""
        return components(self.values, self.places, self.repeats)

    @property
    def non_finite(self) -> int:
        """Return the number of scores that are missing, NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.values)))

    @property
    def is_right_or_wrong(self) -> bool:
        """Return whether each item has one score, and that is 0 or 1."""
        return len(self.values) == len(self.items) and bool(np.isin(self.values, (0.0, 1.0)).all())

    @property
    def clusters_of_scores(self) -> Clusters:
        """Return the cluster of each score."""
        return self.clusters if len(self.places) == len(self.items) else Clusters.of(self.places.astype(str))

    @cached_property
    def clusters(self) -> Clusters:
        """The subjects, or the items where there is but one subject."""
        return question_clusters(self.subjects, self.prompts)


def score_rows(table: pa.Table, record: ScoreRecord, who: str) -> ScoreRows:
    """Return one model's scores from the store's table.

    Raises:
        BrokenRecordError: Items are missing, or one has two scores of one repeat.
    """
    rows = table.filter(pc.equal(table["task"], record.name))
    rows = rows.take(pc.sort_indices(rows, sort_keys=[(name, "ascending") for name in ("subject", "item", "repeat")]))
    subjects, items, labels, prompts = (
        np.asarray(rows[name].to_pylist(), np.object_) for name in ("subject", "item", "repeat", "prompt_sha256")
    )
    values = np.asarray([np.nan if v is None else v for v in rows["score"].to_pylist()], np.float64)

    is_first = np.ones(len(items), np.bool_)
    is_first[1:] = (items[1:] != items[:-1]) | (subjects[1:] != subjects[:-1])
    if int(is_first.sum()) != record.items:
        raise BrokenRecordError(
            f"'{who}' has scores of {int(is_first.sum())} items of '{record.name}', and the run holds {record.items}; "
            "run the same command again."
        )
    doubled = ~is_first[1:] & (labels[1:] == labels[:-1])
    if doubled.any():
        at = int(np.argmax(doubled))
        raise BrokenRecordError(f"'{who}' has two scores of item {items[at]} of '{subjects[at]}', repeat {labels[at]}.")

    repeats = np.unique(labels.astype(str), return_inverse=True)[1].astype(np.int64)
    places = np.asarray(np.cumsum(is_first) - 1, np.int64)
    answers, responses, is_cut = (
        np.asarray(rows[name].to_pylist(), np.object_) for name in ("answer", "response", "is_cut")
    )
    return ScoreRows(
        subjects[is_first], items[is_first], prompts[is_first], values, places, repeats.ravel(), answers, responses,
        is_cut,
    )  # fmt: skip


def pair_scores(variant: ScoreRows, baseline: ScoreRows, task: str, who: str) -> None:
    """Raise a BrokenRecordError unless a variant's scores are of the baseline's items, asked alike."""
    if differs := first_difference(variant, baseline, ("subjects", "items", "prompts")):
        what, count, at = differs
        raise BrokenRecordError(
            f"'{who}' was not asked the baseline's {task}: {count} {what} differ, the first at item "
            f"{baseline.items[at]} of '{baseline.subjects[at]}'."
        )
