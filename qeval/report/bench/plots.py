"""Throughput by batch size and prompt length as bars, with how many times the base's each is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from qeval.report import formatting, style
from qeval.report.bench.rows import MeasuredRow, System
from qeval.report.bench.summary import Summary
from qeval.report.document import Plot

_BAR = 0.2  # inches a bar takes
_GAP = 0.7  # bars' widths between two prompt lengths
_HATCHES = ("", "////", "....")  # for the second and third round of the palette
_STATES = {"oom": "OOM", "refused": "refused", "failed": "failed", "unspent": "no budget", "measured": "broken"}


class BenchKind(NamedTuple):
    """A plot's file name and title, the figure that it shows, and the latency whose ratio to the base's it shows."""

    name: str
    title: str
    figure: str
    latency: str


KINDS = (
    BenchKind("prompt-throughput", "Prompt throughput", "prompt_tps", "prompt"),
    BenchKind("token-throughput", "Token generation throughput", "whole_tps", "whole"),
)


class _Bar(NamedTuple):
    """A row of the benchmark at its height in the plot, with its system's place in the order of colours."""

    row: MeasuredRow
    height: float
    place: int


def throughputs(summary: Summary) -> list[Plot]:
    """Draw a plot of each kind for each batch size at which anything was measured."""
    batches = sorted({row.cell.batch for row in summary.shown})
    with style.styled():
        plots = [_plot(summary, kind, batch) for batch in batches for kind in KINDS]
    return [plot for plot in plots if plot is not None]


def _plot(summary: Summary, kind: BenchKind, batch: int) -> Plot | None:
    rows = [row for row in summary.runnable if row.cell.batch == batch]
    metrics = {id(row): row.figures[kind.figure] for row in summary.shown if kind.figure in row.figures}
    if not any(id(row) in metrics for row in rows):
        return None

    systems = list(dict.fromkeys(row.system for row in summary.runnable))
    bars = _bars(rows, systems)
    figure, axes = style.figure(1.1 + 0.14 * len(systems) + _BAR * (max(bar.height for bar in bars) + 1))
    labels = [_draw(axes, summary, kind, bar) for bar in bars]
    _label(axes, bars)
    axes.set_xlabel(f"{kind.title}, tokens/s, batch size {batch}")
    _legend(axes, systems)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    base = "" if summary.base is None else f" Times: against {summary.base} in the same cell."
    svg, png = style.save(figure)
    alt = f"{kind.title} in tokens a second at batch size {batch}, medians with 95 % intervals: "
    alt += f"{'; '.join(labels)}.{base}"
    return Plot(f"{kind.name}-batch-{batch}", f"{kind.title}, batch size {batch}", alt, svg, png)


def _bars(rows: Sequence[MeasuredRow], systems: Sequence[System]) -> list[_Bar]:
    """Return the bars from the top down: prompt lengths ascending, in each the systems in their order."""
    bars, height = [], 0.0
    for prompt in sorted({row.cell.prompt for row in rows}):
        for place, system in enumerate(systems):
            of_system = [row for row in rows if (row.system, row.cell.prompt) == (system, prompt)]
            bars += [_Bar(row, height, place) for row in of_system]
            height += len(of_system)
        height += _GAP
    return bars


def _draw(axes: Axes, summary: Summary, kind: BenchKind, bar: _Bar) -> str:
    """Draw one bar with its interval and its label, or what became of the cell; return the same in words."""
    row = bar.row
    name = f"{row.system}, prompt {row.cell.prompt}"
    metric = None if summary.broken(row.system) else row.figures.get(kind.figure)
    if metric is None or metric.value is None:
        label = _STATES[row.cell.outcome]
        _annotate(axes, 0.0, bar.height, label, style.muted())
        return f"{name}: {label}"

    axes.barh(bar.height, metric.value, height=0.86, **_bar_style(bar.place))
    if metric.low is not None and metric.high is not None:
        axes.hlines(bar.height, metric.low, metric.high, color=style.ink(), linewidth=1.2)

    # the value, and how many times the base's it is
    label = formatting.value_text(metric)
    times = summary.against_base(row, kind.latency)
    if times is not None and times.value is not None and row.system != summary.base:
        label += f"  {times.value:.{1 if times.value >= 2 else 2}f}×"
    _annotate(axes, max(metric.value, metric.high or 0.0), bar.height, label, style.ink())
    return f"{name}: {label}"


def _annotate(axes: Axes, x: float, y: float, label: str, colour: str) -> None:
    axes.annotate(label, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour)


def _bar_style(place: int) -> dict[str, Any]:
    """Return a system's colour and hatch."""
    rounds = place // len(style.PALETTE)
    return {
        "color": style.colour(place),
        "hatch": _HATCHES[rounds % len(_HATCHES)],
        "edgecolor": style.paper(),
    }


def _label(axes: Axes, bars: Sequence[_Bar]) -> None:
    """Name each prompt length at the middle of its bars; leave room at the right for the longest label."""
    prompts = sorted({bar.row.cell.prompt for bar in bars})
    heights = [[bar.height for bar in bars if bar.row.cell.prompt == prompt] for prompt in prompts]
    axes.set_yticks([sum(each) / len(each) for each in heights], [f"prompt {prompt}" for prompt in prompts])
    axes.set_ylim(max(bar.height for bar in bars) + 0.7, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.28)


def _legend(axes: Axes, systems: Sequence[System]) -> None:
    """Name every system once, also those without a bar in this plot."""
    for place, system in enumerate(systems):
        axes.barh(0.0, 0.0, label=str(system), **_bar_style(place))
