"""From the rows along greedy continuations to metrics: how soon a variant leaves the baseline, and what that means.

A free run leaves at the first position where the variant's most likely token is another than the baseline's: until then
both have read the same. Intervals resample prompts.
"""

from dataclasses import dataclass

import numpy as np

from qeval.report.align import DriftRows
from qeval.report.measure_tokens import as_metrics
from qeval.report.model import Metric, Metrics
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats, Ints
from qeval.types import Better

REJOIN_TOKENS = 8
"""With the baseline's token forced where it leaves, a run has come back when so many tokens after it agree."""

_KINDS: dict[str, tuple[str, Better]] = {
    "drift_equal": ("fraction", "higher"),
    "drift_diverged": ("fraction", "lower"),
    "drift_first_tokens": ("tokens", "higher"),
    "drift_kl_nats": ("nats", "lower"),
    "drift_margin_nats": ("nats", "lower"),
    "drift_rejoined": ("fraction", "higher"),
}


@dataclass(frozen=True, eq=False)
class Left:
    """The prompts at which a run leaves the baseline, as indices, and the position in each; both [prompts that do]."""

    prompts: Ints
    positions: Ints


def drift_metrics(rows: DriftRows, seed: int) -> Metrics:
    """Return how far greedy continuations follow the baseline's; nothing where distances are not finite."""
    if bad := non_finite(rows):
        total = rows.kl_nats.size
        return {name: Metric.broken(unit, better, total, bad) for name, (unit, better) in _KINDS.items()}
    return as_metrics(
        {
            name: estimates.mean(values, clusters, unit=_KINDS[name][0], better=_KINDS[name][1], seed=seed)
            for name, (values, clusters) in columns(rows).items()
        }
    )


def non_finite(rows: DriftRows) -> int:
    """Return how many rows have a distance that is NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(rows.kl_nats) | ~np.isfinite(rows.margin_nats)))


def columns(rows: DriftRows) -> dict[str, tuple[Floats, Clusters]]:
    """Return what each metric is the mean of: values of tokens, of prompts, or of the prompts at which a run leaves."""
    prompts, generated = rows.pred.shape
    equal, left = rows.pred == rows.tokens, leaving(rows)
    first = np.full(prompts, generated, np.float64)
    first[left.prompts] = left.positions
    here = left.prompts, left.positions
    return {
        "drift_equal": (equal.ravel().astype(np.float64), Clusters.of(np.repeat(np.arange(prompts), generated))),
        "drift_diverged": _by_prompt((~equal.all(axis=1)).astype(np.float64)),
        "drift_first_tokens": _by_prompt(first),
        "drift_kl_nats": _by_prompt(rows.kl_nats[here]),
        "drift_margin_nats": _by_prompt(rows.margin_nats[here]),
        "drift_rejoined": _by_prompt(rejoined(rows, left)),
    }


def leaving(rows: DriftRows) -> Left:
    """Return where free runs leave the baseline."""
    other = rows.pred != rows.tokens
    prompts = np.flatnonzero(other.any(axis=1))
    return Left(prompts, other[prompts].argmax(axis=1))


def rejoined(rows: DriftRows, left: Left) -> Floats:
    """Return 1 where the tokens after the forced one agree, else 0; runs that leave near the end are left out."""
    equal, generated = rows.pred == rows.tokens, rows.pred.shape[1]
    long_enough = [
        (p, at) for p, at in zip(left.prompts, left.positions, strict=True) if at + REJOIN_TOKENS < generated
    ]
    return np.asarray([equal[p, at + 1 : at + 1 + REJOIN_TOKENS].all() for p, at in long_enough], np.float64)


def _by_prompt(values: Floats) -> tuple[Floats, Clusters]:
    return values, Clusters.single_rows(len(values))
