"""What each variant of a benchmark lost, from a comparison of the same model's variants: speed and quality joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qeval.errors import UsageError
from qeval.report.bench.rows import Row
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

    row: Row
    value: Metric
    loss: Metric
    front: bool


def losses(folder: Path, record: BenchRecord) -> Losses:
    """What each ranked variant lost: KL, else the perplexity ratio, as a comparison ranks them.

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


def own_losses(out: Path, found: Summary) -> tuple[Losses | None, list[str]]:
    """Those of a comparison in the benchmark's own folder, if it holds one; why they don't fit, where they don't."""
    if not (out / REPORT).exists():
        return None, []
    try:
        return losses(out, found.record), []
    except UsageError as error:
        return None, [f"No quality is laid beside speed: {error}"]


def speed_points(found: Summary, lost: Mapping[str, Metric]) -> list[Point]:
    """Generated tokens a second, in the cell that most systems share, with the front marked."""
    rows = [row for row in shared_rows(found) if row.cell.variant in lost and "whole_tps" in row.figures]
    return _marked([(row, row.figures["whole_tps"], lost[row.cell.variant]) for row in rows], more_is_better=True)


def memory_points(found: Summary, lost: Mapping[str, Metric]) -> list[Point]:
    """Peak memory while generating, in bytes, in the same cell; read once, so it has no interval."""
    rows = [row for row in shared_rows(found) if row.cell.variant in lost and row.cell.peak_generate_bytes]
    values = [(row, _bytes(row.cell.peak_generate_bytes or 0), lost[row.cell.variant]) for row in rows]
    return _marked(values, more_is_better=False)


def shared_rows(found: Summary) -> list[Row]:
    """The rows of one cell: that which most systems have, and of these the smallest batch and the shortest prompt."""
    places = sorted({row.place for row in found.shown})
    if not places:
        return []
    best = max(places, key=lambda place: sum(row.place == place for row in found.shown))
    return [row for row in found.shown if row.place == best]


def _marked(points: Sequence[tuple[Row, Metric, Metric]], *, more_is_better: bool) -> list[Point]:
    """A point is on the front where no other is as good on both axes and better on one."""
    sign = -1.0 if more_is_better else 1.0
    costs = [(sign * (value.value or 0.0), loss.value or 0.0) for _, value, loss in points]
    front = [
        not any(x <= own[0] and y <= own[1] and (x, y) != own for x, y in costs)
        for own in costs
    ]  # fmt: skip
    return [Point(*point, on) for point, on in zip(points, front, strict=True)]


def _bytes(size_bytes: int) -> Metric:
    return Metric(value=size_bytes, low=None, high=None, unit="B", better="lower", n=1, clusters=1)


def _metric(report: Report) -> str:
    return "kl_nats" if any("kl_nats" in variant.metrics for variant in report.variants) else "ppl_ratio"
