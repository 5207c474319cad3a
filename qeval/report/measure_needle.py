"""From answers to needles to metrics: recall, log-probability and rank, over all and by depth and length."""

import numpy as np

from qeval.report.measure_tokens import as_metrics
from qeval.report.model import Metric, Metrics, NeedleCell
from qeval.report.needle_rows import NeedleRows
from qeval.stats import estimates
from qeval.types import Better

_KINDS: dict[str, tuple[str, Better]] = {
    "needle_recall": ("fraction", "higher"),
    "needle_log_p_nats": ("nats", "higher"),
    "needle_rank": ("rank", "lower"),
}
_CHANGES: dict[str, tuple[str, Better]] = {
    "needle_recall_drop": ("fraction", "lower"),
    "needle_loss_nats": ("nats", "lower"),
}


def needle_metrics(rows: NeedleRows, seed: int, baseline: NeedleRows | None = None) -> Metrics:
    """Return a model's own figures, and against a baseline its losses; nothing where log-probabilities aren't finite.

    Args:
        rows: The model's answers.
        seed: Of the bootstrap.
        baseline: The baseline's answers to the same needles.
    """
    kinds = _KINDS | (_CHANGES if baseline else {})
    if bad := int(np.count_nonzero(~np.isfinite(rows.log_p))):
        return {name: Metric.broken(unit, better, len(rows.log_p), bad) for name, (unit, better) in kinds.items()}
    clusters = rows.clusters
    values = {"needle_recall": rows.recall, "needle_log_p_nats": rows.log_p}
    if baseline is not None:
        values["needle_recall_drop"] = baseline.recall - rows.recall
        values["needle_loss_nats"] = baseline.log_p - rows.log_p
    metrics = {
        name: estimates.mean(each, clusters, unit=kinds[name][0], better=kinds[name][1], seed=seed)
        for name, each in values.items()
    }
    ranks = np.log(rows.rank)
    metrics["needle_rank"] = estimates.ratio(
        clusters.sums(ranks), clusters.sizes(), n=ranks.size, unit="rank", better="lower", seed=seed, transform=np.exp
    )
    return as_metrics(metrics)


def needle_cells(rows: NeedleRows, seed: int, baseline: NeedleRows | None = None) -> list[NeedleCell]:
    """Return the same of each length and depth by itself, the shortest and the shallowest first."""
    if not np.isfinite(rows.log_p).all():
        return []
    return [
        NeedleCell(
            length=int(length),
            depth=float(depth),
            metrics=needle_metrics(
                rows.select(length, depth), seed, None if baseline is None else baseline.select(length, depth)
            ),
        )
        for length in np.unique(rows.lengths)
        for depth in np.unique(rows.depths)
    ]
