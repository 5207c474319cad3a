"""Join speed and quality: the loss of a benchmark's variants, from a comparison of the same model's variants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qeval.errors import UsageError
from qeval.report.bench.rows import MeasuredRow
from qeval.report.bench.summary import Summary
from qeval.report.build import quality
from qeval.report.model import Metric, Report
from qeval.report.sweep import REPORT, read_report
from qeval.store.timings import BenchRecord


class Losses(NamedTuple):
    """The name of a metric, and each variant's loss in it."""

    metric: str
    lost: Mapping[str, Metric]


@dataclass(frozen=True)
class Point:
    """A measured cell with its variant's loss; `value` is the speed, or the memory in bytes."""

    row: MeasuredRow
    value: Metric
    loss: Metric
    front: bool


def losses(folder: Path, record: BenchRecord) -> Losses:
    """Return each ranked variant's loss: KL, else the perplexity ratio, as a comparison ranks them.

    Raises:
        UsageError: `folder` holds no report, or one of another model, or none of the benchmark's variants.
        BrokenRecordError: its report is torn.
    """
    report = read_report(folder)
    if report.model.weights_sha256 != record.model.weights_sha256:
        raise UsageError(
            f"The comparison in '{folder}' is of {report.model.name}, whose weights are not those of this benchmark of "
            f"{record.model.name}; give one of the same model."
        )
    name = _metric(report)
    lost = {v.name: v.metrics[name] for v in report.variants if name in v.metrics and quality(v) is not None}
    names = record.settings.variants
    if not set(names) & set(lost):
        raise UsageError(
            f"The comparison in '{folder}' has none of this benchmark's variants ({', '.join(names)}); it has "
            f"{', '.join(sorted(lost)) or 'none that is ranked'}."
        )
    return Losses(name, lost)


def find_losses(out: Path, summary: Summary) -> tuple[Losses | None, list[str]]:
    """Return the losses of a comparison in the benchmark's own folder, None without one; why they don't fit, if so."""
    if not (out / REPORT).exists():
        return None, []
    try:
        return losses(out, summary.record), []
    except UsageError as error:
        return None, [f"No quality is laid beside speed: {error}"]


def speed_points(summary: Summary, lost: Mapping[str, Metric]) -> list[Point]:
    """Return generated tokens a second, in the cell that most systems share, with the front marked."""
    rows = [row for row in shared_rows(summary) if row.cell.variant in lost and "whole_tps" in row.figures]
    return _marked([(row, row.figures["whole_tps"], lost[row.cell.variant]) for row in rows], more_is_better=True)


def memory_points(summary: Summary, lost: Mapping[str, Metric]) -> list[Point]:
    """Return peak memory while generating, in bytes, in the same cell; read once, so it has no interval."""
    rows = [row for row in shared_rows(summary) if row.cell.variant in lost and row.cell.peak_generate_bytes]
    values = [(row, _bytes(row.cell.peak_generate_bytes or 0), lost[row.cell.variant]) for row in rows]
    return _marked(values, more_is_better=False)


def shared_rows(summary: Summary) -> list[MeasuredRow]:
    """Return the rows of the cell that most systems have, and of such cells the smallest one."""
    places = sorted({row.place for row in summary.shown})
    if not places:
        return []
    best = max(places, key=lambda place: sum(row.place == place for row in summary.shown))
    return [row for row in summary.shown if row.place == best]


def _marked(points: Sequence[tuple[MeasuredRow, Metric, Metric]], *, more_is_better: bool) -> list[Point]:
    """Mark the points that are on the front: no other is as good on both axes and better on one."""
    sign = -1.0 if more_is_better else 1.0
    costs = [(sign * (value.value or 0.0), loss.value or 0.0) for _, value, loss in points]
    front = [
        not any(x <= cost[0] and y <= cost[1] and (x, y) != cost for x, y in costs)
        for cost in costs
    ]  # fmt: skip
    return [Point(*point, on) for point, on in zip(points, front, strict=True)]


def _bytes(size_bytes: int) -> Metric:
    return Metric(value=size_bytes, low=None, high=None, unit="B", better="lower", n=1, clusters=1)


def _metric(report: Report) -> str:
    return "kl_nats" if any("kl_nats" in variant.metrics for variant in report.variants) else "ppl_ratio"
