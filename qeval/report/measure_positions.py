"""Split a variant's loss by position: what the cache holds grows along a window, and with it the errors of a cache."""

import numpy as np

from qeval.report.align import TokenRows
from qeval.report.model import Metric, PositionBucket
from qeval.stats import estimates

_FIRST = 128
"""Positions of the first bucket; each that follows ends at twice the position."""


def kl_by_position(rows: TokenRows, seed: int) -> list[PositionBucket]:
    """Return KL by the position in the window, in buckets that double: 0 to 127, to 255, to 511 and so on.

    Empty where KL is not finite, or all scored positions lie in one bucket.
    """
    scored = rows.scored["kl_nats"]
    kl, positions, clusters = rows.of("kl_nats"), rows.positions[scored], rows.clusters("kl_nats")
    if not kl.size or not np.isfinite(kl).all():
        return []
    octaves = np.floor(np.log2(np.maximum(positions, _FIRST / 2) / (_FIRST / 2))).astype(int)
    found = np.unique(octaves)
    if found.size < 2:
        return []
    buckets = []
    for octave in found:
        inside = octaves == octave
        mean = estimates.mean(kl[inside], clusters.select(inside), unit="nats", better="lower", seed=seed)
        end = _FIRST * 2 ** int(octave)
        start = end // 2 if octave else 0
        buckets.append(PositionBucket(first=start, last=end - 1, positions=int(inside.sum()), kl_nats=Metric.of(mean)))
    return buckets
