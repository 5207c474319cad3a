"""Scores that were drawn several times: what of a difference's variance more repeats would take away.

An item's score with sampled generation is a draw. Of R scores of each of n items three things vary: the items
themselves, what a repeat (a seed) adds to all items alike, and the draws within an item. The mean of item means with
clustered errors holds the first and the last; a repeat's own effect is common to all items, so no spread over items
shows it, and it is estimated apart, from the means of the repeats (two-way analysis of variance with random effects,
as in S. Searle, G. Casella and C. McCulloch, Variance Components, 1992, chapter 4).
"""

from dataclasses import dataclass, replace
from math import ceil, sqrt

import numpy as np
from numpy.typing import ArrayLike

from qeval.stats.bootstrap import Clusters, Floats, Interval, Ints, finite
from qeval.stats.bounds import factor_to_decide
from qeval.stats.closed import Mean, clustered_mean


@dataclass(frozen=True)
class Components:
    """Variances of single scores: of the draws `within` an item, and of what a repeat adds to all items alike.

    `within` is None without a repeat: nothing tells draws from items. `seeds` is 0 where repeats are not the same for
    all items. `repeats` is the harmonic mean of the scores an item has; `repeat_count` the number of distinct repeats.
    """

    within: float | None
    seeds: float
    repeats: float
    repeat_count: int


@dataclass(frozen=True)
class BoundedScore:
    """A mean difference of scores, each item's mean over its repeats; every field in the score's own unit.

    `clustered` is that of item means; `seed_variance` what repeats add to all items of a side, squared error;
    `repeat_variance` the part of the squared error that more repeats would shrink, None where none were drawn.
    """

    clustered: Mean
    seed_variance: float = 0.0
    seed_freedom: float | None = None
    repeat_variance: float | None = None
    repeats: float = 1.0

    @property
    def value(self) -> float:
        """The mean difference."""
        return self.clustered.value

    @property
    def mean(self) -> Mean:
        """The clustered mean with the repeats' own error added; degrees of freedom after Satterthwaite."""
        plain = self.clustered
        if plain.error is None or plain.freedom is None or not self.seed_variance or self.seed_freedom is None:
            return plain
        items = plain.error**2
        both = items + self.seed_variance
        freedom = both**2 / (items**2 / plain.freedom + self.seed_variance**2 / self.seed_freedom)
        return replace(plain, error=sqrt(both), freedom=freedom)

    def bounds(self, confidence: float) -> Interval:
        """Return Student's t bounds."""
        return self.mean.bounds(confidence)

    def grown(self, factor: float) -> "BoundedScore":
        """Return what more items would give; a repeat's own effect stays what it is."""
        within = None if self.repeat_variance is None else self.repeat_variance / factor
        return replace(self, clustered=self.clustered.grown(factor), repeat_variance=within)

    def repeated(self, factor: float) -> "BoundedScore":
        """Return what `factor` times as many repeats of the same items would give.

        Raises:
            ValueError: Without repeats nothing says what they would take away.
        """
        if self.repeat_variance is None:
            raise ValueError("What more repeats give is known from repeats alone.")
        if self.clustered.error is None:
            return self
        items = max(self.clustered.error**2 - self.repeat_variance, 0.0)
        return replace(
            self,
            clustered=replace(self.clustered, error=sqrt(items + self.repeat_variance / factor)),
            seed_variance=self.seed_variance / factor,
            seed_freedom=None if self.seed_freedom is None else self.seed_freedom * factor,
            repeat_variance=self.repeat_variance / factor,
            repeats=self.repeats * factor,
        )


def components(scores: ArrayLike, items: Ints, repeats: Ints) -> Components:
    """Return the variances of one side's scores.

    Args:
        scores: One a row, in any unit, [rows].
        items: The item of each, counted from 0, [rows].
        repeats: The repeat (seed) of each, counted from 0, [rows].
    """
    values = finite(scores)
    counts = np.bincount(items)
    harmonic, distinct = float(1 / np.mean(1 / counts)), int(repeats.max()) + 1
    spare = len(values) - len(counts)
    if spare < 1:
        return Components(None, 0.0, harmonic, distinct)

    residual = values - item_means(values, items)[items]
    if len(values) != len(counts) * distinct or len(counts) < 2:
        return Components(float((residual**2).sum()) / spare, 0.0, harmonic, distinct)

    # every item has every repeat: a repeat's mean residual is what it adds to all items alike
    effects = np.bincount(repeats, weights=residual) / len(counts)
    within = float(((residual - effects[repeats]) ** 2).sum()) / ((len(counts) - 1) * (distinct - 1))
    seeds = float((effects**2).sum()) / (distinct - 1) - within / len(counts)
    return Components(within, max(seeds, 0.0), harmonic, distinct)


def item_means(scores: Floats, items: Ints) -> Floats:
    """Return each item's mean score, [items], from scores and their items, [rows]."""
    return np.asarray(np.bincount(items, weights=scores) / np.bincount(items), np.float64)


def difference_of(means: Floats, sides: tuple[Components, Components], clusters: Clusters) -> BoundedScore:
    """Return the mean difference of two sides' scores, paired by item.

    Args:
        means: The difference of the item means, one side minus the other, [items].
        sides: The variances of the scores of both sides, whose repeats are drawn apart.
        clusters: The cluster of each item.
    """
    clustered = clustered_mean(means, clusters)
    seeds = sum(side.seeds / side.repeat_count for side in sides)
    freedoms = [side.repeat_count - 1 for side in sides if side.seeds]
    drawn = [side for side in sides if side.within is not None]
    within = sum((side.within or 0.0) / side.repeats for side in drawn) / len(means) if drawn else None
    repeats = min((side.repeats for side in drawn), default=1.0)
    return BoundedScore(clustered, seeds, float(min(freedoms)) if freedoms else None, within, repeats)


def repeats_to_decide(of: BoundedScore, margin: float, confidence: float) -> int | None:
    """Return how many repeats an item would put one bound past `margin`, the difference staying what it is.

    None where even ten thousand times as many would not, or where there is no repeat to learn it from.
    """
    if of.repeat_variance is None:
        return None
    factor = factor_to_decide(of, margin, confidence, of.repeated)
    return None if factor is None else ceil(factor * of.repeats)
