"""Answers to needles, every variant's with the baseline's: nothing is paired that was not asked alike."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qeval.errors import BrokenRecordError
from qeval.report.align import first_difference
from qeval.stats.bootstrap import Clusters, Floats, Ints
from qeval.store.run import NeedleRecord


@dataclass(frozen=True, eq=False)
class NeedleRows:
    """One model's answers in the order of (length, haystack, depth); all [needles].

    `log_p` is the answer's log-probability in nats, `rank` the largest rank of its tokens: 1 where a model that says
    what is likeliest would say the answer.
    """

    lengths: Ints
    haystacks: Ints
    depths: Floats
    log_p: Floats
    rank: Floats
    prompts: NDArray[np.object_]

    @property
    def recall(self) -> Floats:
        """1 where the answer is what would be said greedily, else 0."""
        return np.asarray(self.rank == 1, np.float64)

    @property
    def clusters(self) -> Clusters:
        """The haystacks: needles of one are read from one text."""
        return Clusters.of(np.cumsum(self._starts) - 1)

    @property
    def _starts(self) -> Ints:
        first = np.ones(len(self.lengths), np.int64)
        first[1:] = (np.diff(self.lengths) != 0) | (np.diff(self.haystacks) != 0)
        return first

    def select(self, length: int, depth: float) -> "NeedleRows":
        """Return the needles of one length and depth."""
        chosen = (self.lengths == length) & (self.depths == depth)
        names = ("lengths", "haystacks", "depths", "log_p", "rank", "prompts")
        return NeedleRows(**{name: getattr(self, name)[chosen] for name in names})


def needle_rows(table: pa.Table, record: NeedleRecord, who: str) -> NeedleRows:
    """Return one model's answers from the store's table.

    Raises:
        BrokenRecordError: They are not those of every haystack and depth of the run, each once.
    """
    columns = {name: np.asarray(table[name].to_pylist()) for name in ("length", "haystack", "depth", "log_p", "rank")}
    order = np.lexsort((columns["depth"], columns["haystack"], columns["length"]))
    places = [
        (length, number, depth)
        for length in sorted(record.lengths)
        for number in range(record.haystacks)
        for depth in sorted(record.depths)
    ]
    found = list(zip(*(columns[name][order].tolist() for name in ("length", "haystack", "depth")), strict=True))
    if found != places:
        raise BrokenRecordError(
            f"'{who}' has {len(found)} answers to needles, which are not one for each of {len(places)} of the run; run "
            "the same command again."
        )
    return NeedleRows(
        lengths=columns["length"][order].astype(np.int64),
        haystacks=columns["haystack"][order].astype(np.int64),
        depths=columns["depth"][order].astype(np.float64),
        log_p=columns["log_p"][order].astype(np.float64),
        rank=columns["rank"][order].astype(np.float64),
        prompts=np.asarray(table["prompt_sha256"].to_pylist(), np.object_)[order],
    )


def pair_needles(variant: NeedleRows, baseline: NeedleRows, who: str) -> None:
    """Raise a BrokenRecordError unless a variant was asked the baseline's needles."""
    if differs := first_difference(variant, baseline, ("prompts",)):
        _, count, at = differs
        raise BrokenRecordError(
            f"'{who}' was not asked the baseline's needles: {count} prompts differ, the first in haystack "
            f"{baseline.haystacks[at]} of {baseline.lengths[at]} tokens."
        )
