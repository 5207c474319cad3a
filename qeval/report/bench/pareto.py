"""Quality against speed, and quality against memory: a point a system, the Pareto front joined."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from qeval.report import formatting, style
from qeval.report.bench.quality import Point, memory_points, speed_points
from qeval.report.bench.summary import Summary
from qeval.report.document import Plot
from qeval.report.model import Metric
from qeval.report.plot_labels import plain_ticks

_LOSSES = {
    "kl_nats": "KL from the baseline (nats)",
    "ppl_ratio": "Perplexity, times the baseline's",
}
_LEAST = 2
"""Points below which there is nothing to weigh."""


class Plane(NamedTuple):
    """A plot's file name and title, what its horizontal axis says, and by what values are multiplied there."""

    name: str
    title: str
    label: str
    scale: float


_SPEED = Plane("quality-speed", "Quality against speed", "Generated tokens a second", 1.0)
_MEMORY = Plane("quality-memory", "Quality against memory", "Peak memory while generating (MB)", 1e-6)


def trade_offs(summary: Summary, loss: str, lost: Mapping[str, Metric]) -> list[Plot]:
    """Draw both planes, as far as two systems or more have a place in them; `loss` names the metric of `lost`."""
    drawn = ((_SPEED, speed_points(summary, lost)), (_MEMORY, memory_points(summary, lost)))
    with style.styled():
        return [_plot(summary, plane, loss, points) for plane, points in drawn if len(points) >= _LEAST]


def _plot(summary: Summary, plane: Plane, loss: str, points: Sequence[Point]) -> Plot:
    figure, axes = style.figure(3.4 + 0.14 * len(points))
    front = sorted((plane.scale * (p.value.value or 0.0), p.loss.value or 0.0) for p in points if p.front)
    axes.plot(*zip(*front, strict=True), color=style.muted(), linewidth=1.2, zorder=1, label="Pareto front")
    for place, point in enumerate(points):
        _point(axes, plane.scale, place, point)
    _unquantized(axes, summary, plane, points)

    if loss == "kl_nats" and all((point.loss.value or 0.0) > 0 for point in points):
        axes.set_yscale("log")
    axes.set_xlabel(plane.label)
    axes.set_ylabel(_LOSSES[loss])
    axes.grid(True)
    axes.margins(0.08)
    plain_ticks(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=2)
    svg, png = style.save(figure)
    return Plot(plane.name, f"{plane.title}, {_cell(points)}", _alt_text(summary, plane, loss, points), svg, png)


def _unquantized(axes: Axes, summary: Summary, plane: Plane, points: Sequence[Point]) -> None:
    """Draw a line where the base lies: it has no loss, so it has no place of its own on a logarithmic axis."""
    place = points[0].row.place
    row = next((row for row in summary.shown if (row.system, row.place) == (summary.base, place)), None)
    speed = None if row is None or "whole_tps" not in row.figures else row.figures["whole_tps"].value
    value = speed if plane is _SPEED else None if row is None else row.cell.peak_generate_bytes
    if value is not None:
        axes.axvline(
            plane.scale * value, color=style.muted(), linestyle=":", linewidth=1.2, label=f"{summary.base} (no loss)"
        )


def _point(axes: Axes, scale: float, place: int, point: Point) -> None:
    """Draw a system: filled when on the front, hollow when not; intervals on both axes where there are any."""
    x, y, colour = scale * (point.value.value or 0.0), point.loss.value or 0.0, style.colour(place)
    if point.value.low is not None and point.value.high is not None:
        axes.hlines(y, scale * point.value.low, scale * point.value.high, color=colour, linewidth=1.4, zorder=2)
    if point.loss.low is not None and point.loss.high is not None:
        axes.vlines(x, point.loss.low, point.loss.high, color=colour, linewidth=1.4, zorder=2)
    axes.plot(
        x, y, style.marker(place), color=colour, markersize=7, zorder=3, label=str(point.row.system),
        markerfacecolor=colour if point.front else style.paper(), linestyle="none",
    )  # fmt: skip


def _cell(points: Sequence[Point]) -> str:
    batch, prompt = points[0].row.place
    return f"batch {batch}, prompt {prompt}"


def _alt_text(summary: Summary, plane: Plane, loss: str, points: Sequence[Point]) -> str:
    front = formatting.listed([str(point.row.system) for point in points if point.front])
    intervals = "95 % intervals on both axes" if plane is _SPEED else "95 % intervals of the loss; memory is read once"
    return (
        f"{_LOSSES[loss]} against {plane.label.lower()} of {summary.record.model.name} at {_cell(points)}, one point "
        f"an engine with a variant, {intervals}. Filled points are on the Pareto front: {front}."
    )
