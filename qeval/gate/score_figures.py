"""Figures of scores, of tasks without choices or of `qeval import`, paired by item, with their bounds."""

from qeval.errors import QevalError
from qeval.gate.figure import Figure, both_ways
from qeval.report.score_rows import ScoreRows
from qeval.stats import bounds
from qeval.stats.bootstrap import NonFiniteError
from qeval.stats.bounds import Bounded
from qeval.stats.repeats import BoundedScore, difference_of
from qeval.store.run import ScoreRecord


def score_figure(record: ScoreRecord, name: str, rows: ScoreRows, baseline: ScoreRows) -> Figure:
    """Return a figure of one score: `acc_drop`, `flips`, `right_to_wrong` or `score_loss`.

    Raises:
        QevalError: The scores are not of the kind that the figure takes.
        NonFiniteError: Some items were not scored; it counts them.
    """
    if bad := rows.non_finite + baseline.non_finite:
        raise NonFiniteError(bad, len(rows.values) + len(baseline.values))
    if name == "choice_kl_nats":
        raise QevalError(f"'{record.name}' holds scores and no log-likelihoods of choices, so its choices have no KL.")
    if name == "acc_drop" and (record.unit != "fraction" or record.better != "higher"):
        raise QevalError(f"'{record.name}' is no share of right answers; limit {record.name}_score_loss in units.")

    single = rows.is_right_or_wrong and baseline.is_right_or_wrong
    if name in ("flips", "right_to_wrong") and not single:
        raise QevalError(f"'{record.name}' has other scores than one 0 or 1 an item, so no answer flips.")

    # a loss is what the baseline is better by, whichever way is better
    sign = 1 if record.better == "higher" else -1
    change = sign * (baseline.means - rows.means)
    bound: Bounded
    if name in ("flips", "right_to_wrong"):
        bound = bounds.share_of(change > 0 if name == "right_to_wrong" else change != 0, rows.clusters)
    elif single and record.better == "higher":
        bound = bounds.drop_of(baseline.means, rows.means, rows.clusters)
    else:
        bound = difference_of(change, (baseline.variances, rows.variances), rows.clusters)

    clusters = "subjects" if rows.clusters.count < len(rows.items) else "items"
    detail = both_ways(baseline.means, rows.means) if single else _repeats(bound)
    return Figure(bound.value, bound, "items", clusters, detail)


def _repeats(bound: Bounded) -> str | None:
    """Return what of the variance is the draws' own, where items were scored more than once."""
    if not isinstance(bound, BoundedScore) or bound.repeat_variance is None or not bound.mean.error:
        return None
    share = min(bound.repeat_variance + bound.seed_variance, bound.mean.error**2) / bound.mean.error**2
    return f"{bound.repeats:.3g} repeats an item, whose own spread is {share:.0%} of the variance"
