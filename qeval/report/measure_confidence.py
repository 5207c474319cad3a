"""Split a variant's loss by the baseline's confidence: KL by its entropy, flips by its margin between choices.

A flip where the baseline was indifferent is not the flip of a sure answer, and a KL where it spread its bets is not
one where it knew. The buckets are the baseline's, so that every variant is cut at the same places.
"""

from itertools import pairwise

import numpy as np

from qeval.report import measure_items
from qeval.report.align import ItemRows, Mask, TokenRows
from qeval.report.independent import question_clusters
from qeval.report.model import EntropyBucket, MarginBucket, Metric
from qeval.stats import estimates
from qeval.stats.bootstrap import Floats

FIFTHS = 5
_FLIPS = ("right_to_wrong", "wrong_to_right", "wrong_to_other")
_MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Edges of the margin: the probability of the baseline's first choice above its second's, over the choices."""


def kl_by_entropy(rows: TokenRows, baseline: TokenRows, seed: int) -> list[EntropyBucket]:
    """Return KL and agreement in each fifth of the positions by the baseline's entropy, the surest first.

    Empty where KL is not finite, or the baseline's entropy was not kept or is not finite.
    """
    scored = rows.scored["kl_nats"]
    kl, clusters = rows.values["kl_nats"][scored], rows.clusters("kl_nats")
    if not kl.size or not baseline.scored["entropy_nats"][scored].all():
        return []
    entropy = baseline.values["entropy_nats"][scored]
    if not (np.isfinite(kl).all() and np.isfinite(entropy).all()):
        return []

    agreement, total = rows.values["top1_agreement"][scored], float(kl.sum())
    buckets = []
    for chosen in _fifths(entropy):
        inside = clusters.select(chosen)
        mean = estimates.mean(kl[chosen], inside, unit="nats", better="lower", seed=seed)
        same = estimates.mean(agreement[chosen], inside, unit="fraction", better="higher", seed=seed)
        buckets.append(
            EntropyBucket(
                low_nats=float(entropy[chosen].min()),
                high_nats=float(entropy[chosen].max()),
                positions=int(chosen.sum()),
                kl_share=float(kl[chosen].sum()) / total if total else None,
                kl_nats=Metric.of(mean),
                top1_agreement=Metric.of(same),
            )
        )
    return buckets


def flips_by_margin(rows: ItemRows, baseline: ItemRows, seed: int) -> list[MarginBucket]:
    """Return the flips by the baseline's margin between its first two choices, without empty buckets.

    All log-likelihoods must be finite.
    """
    margin, went = margins(baseline), measure_items.transitions(rows, baseline)
    buckets = []
    for low, high in pairwise(_MARGINS):
        chosen = (margin >= low) & ((margin < high) | (high == 1.0))
        if chosen.any():
            inside = question_clusters(rows.subjects[chosen], rows.prompts[chosen])
            counts = {name: int((went[name] & chosen).sum()) for name in _FLIPS}
            flipped = (went["right_to_wrong"] | went["wrong_to_right"])[chosen]
            share = estimates.mean(flipped, inside, unit="fraction", better="lower", seed=seed)
            buckets.append(
                MarginBucket(low=low, high=high, questions=int(chosen.sum()), flips=Metric.of(share), **counts)
            )
    return buckets


def margins(rows: ItemRows) -> Floats:
    """Return the probability of each question's first choice above that of its second, [questions]."""
    p = np.exp(measure_items.log_softmax_rows(rows))
    question = np.repeat(np.arange(len(rows.starts)), rows.counts())
    ordered = p[np.lexsort((-p, question))]
    second = np.where(rows.counts() > 1, rows.starts + 1, rows.starts)
    return np.asarray(ordered[rows.starts] - ordered[second], np.float64)


def _fifths(values: Floats) -> list[Mask]:
    """Return which values are in each fifth, equal ones in their order; a fifth may be empty and is then left out."""
    place = np.empty(len(values), np.int64)
    place[np.argsort(values, kind="stable")] = np.arange(len(values)) * FIFTHS // len(values)
    return [place == fifth for fifth in range(FIFTHS) if (place == fifth).any()]
