"""From scores that another program gave to metrics: each model's mean, and its paired difference from the baseline.

Intervals are t intervals clustered by subject (by item where there is one subject), with what repeats add to all items
alike counted in; a gate bounds the same difference.
"""

from collections.abc import Iterable

from qeval.report.document import Table, TableCell, metric_cell
from qeval.report.model import Metric, Metrics, Report
from qeval.report.score_rows import ScoreRows
from qeval.stats.repeats import BoundedScore, Components, difference_of
from qeval.store.run import ScoreRecord
from qeval.types import Estimate

_NOTHING = Components(None, 0.0, 1.0, 1)


def score_metrics(record: ScoreRecord, rows: ScoreRows) -> Metrics:
    """Return one model's mean score, `NAME_score`; it has no value where items were not scored."""
    name = f"{record.name}_score"
    if rows.non_finite:
        return {name: Metric.broken(record.unit, record.better, len(rows.items), rows.non_finite)}
    return {name: _metric(difference_of(rows.means, (rows.variances, _NOTHING), rows.clusters), record)}


def score_changes(record: ScoreRecord, rows: ScoreRows, baseline: ScoreRows) -> Metrics:
    """Return a variant's mean score minus the baseline's, paired by item, `NAME_score_diff`."""
    name, bad = f"{record.name}_score_diff", rows.non_finite + baseline.non_finite
    if bad:
        return {name: Metric.broken(record.unit, record.better, len(rows.items), bad)}
    change = rows.means - baseline.means
    return {name: _metric(difference_of(change, (baseline.variances, rows.variances), rows.clusters), record)}


def scores_table(report: Report, scores: Iterable[ScoreRecord]) -> Table:
    """Return a row a model and score: the mean, and the paired difference from the baseline."""
    models = [(report.baseline.label, report.baseline.metrics), *((v.name, v.metrics) for v in report.variants)]
    rows = tuple(
        (
            TableCell(score.title),
            TableCell(name),
            metric_cell(metrics.get(f"{score.name}_score")),
            metric_cell(metrics.get(f"{score.name}_score_diff"), signed=True),
            TableCell(f"{score.better} is better"),
            TableCell(f"{score.items:,}"),
        )
        for score in scores
        for name, metrics in models
    )
    columns = ("Score", "Model", "Mean", "Minus the baseline's, paired", "Direction", "Items")
    return Table("Scores that another program gave", columns, rows)


def _metric(bounded: BoundedScore, record: ScoreRecord) -> Metric:
    mean = bounded.mean
    ends = mean.interval()
    return Metric.of(Estimate(mean.value, ends.low, ends.high, record.unit, record.better, mean.n, mean.clusters))
