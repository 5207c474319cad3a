"""Throughput by batch size and prompt length as bars, with how many times the base's each is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from qeval.report import style, words
from qeval.report.bench.rows import Row, System
from qeval.report.bench.summary import Summary
from qeval.report.page import Plot

_BAR = 0.2  # inches a bar takes
_GAP = 0.7  # bars' widths between two prompt lengths
_HATCHES = ("", "////", "....")  # for the second and third round of the palette
_STATES = {"oom": "OOM", "refused": "refused", "failed": "failed", "unspent": "no budget", "measured": "broken"}


class Kind(NamedTuple):
    """A plot's file name and title, the figure that it shows, and the latency whose ratio to the base's it tells."""

    name: str
    title: str
    figure: str
    latency: str


KINDS = (
    Kind("prompt-throughput", "Prompt throughput", "prompt_tps", "prompt"),
    Kind("token-throughput", "Token generation throughput", "whole_tps", "whole"),
)


class _Bar(NamedTuple):
    """A row of the benchmark at its height in the plot, with its system's place in the order of colours."""

    row: Row
    height: float
    place: int


def throughputs(found: Summary) -> list[Plot]:
    """A plot of each kind for each batch size at which anything was measured."""
    batches = sorted({row.cell.batch for row in found.shown})
    with style.styled():
        made = [_plot(found, kind, batch) for batch in batches for kind in KINDS]
    return [plot for plot in made if plot is not None]


def _plot(found: Summary, kind: Kind, batch: int) -> Plot | None:
    rows = [row for row in found.told if row.cell.batch == batch]
    told = {id(row): row.figures[kind.figure] for row in found.shown if kind.figure in row.figures}
    if not any(id(row) in told for row in rows):
        return None
    systems = list(dict.fromkeys(row.system for row in found.told))
    bars = _bars(rows, systems)
    made, axes = style.figure(1.1 + 0.14 * len(systems) + _BAR * (max(bar.height for bar in bars) + 1))
    said = [_draw(axes, found, kind, bar) for bar in bars]
    _label(axes, bars)
    axes.set_xlabel(f"{kind.title}, tokens/s, batch size {batch}")
    _legend(axes, systems)
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    base = "" if found.base is None else f" Times: against {found.base} in the same cell."
    svg, png = style.save(made)
    alt = (
        f"{kind.title} in tokens a second at batch size {batch}, medians with 95 % intervals: {'; '.join(said)}.{base}"
    )
    return Plot(f"{kind.name}-batch-{batch}", f"{kind.title}, batch size {batch}", alt, svg, png)


def _bars(rows: Sequence[Row], systems: Sequence[System]) -> list[_Bar]:
    """From the top down: prompt lengths ascending, in each the systems in their order."""
    found, height = [], 0.0
    for prompt in sorted({row.cell.prompt for row in rows}):
        for place, system in enumerate(systems):
            own = [row for row in rows if (row.system, row.cell.prompt) == (system, prompt)]
            found += [_Bar(row, height, place) for row in own]
            height += len(own)
        height += _GAP
    return found


def _draw(axes: Axes, found: Summary, kind: Kind, bar: _Bar) -> str:
    """One bar with its interval and its label, or what became of the cell; the same in words."""
    row = bar.row
    name = f"{row.system}, prompt {row.cell.prompt}"
    metric = None if found.broken(row.system) else row.figures.get(kind.figure)
    if metric is None or metric.value is None:
        label = _STATES[row.cell.outcome]
        _annotate(axes, 0.0, bar.height, label, style.muted())
        return f"{name}: {label}"
    axes.barh(bar.height, metric.value, height=0.86, **_dress(bar.place))
    if metric.low is not None and metric.high is not None:
        axes.hlines(bar.height, metric.low, metric.high, color=style.ink(), linewidth=1.2)
    label = words.value_text(metric)
    times = found.against_base(row, kind.latency)
    if times is not None and times.value is not None and row.system != found.base:
        label += f"  {times.value:.{1 if times.value >= 2 else 2}f}×"
    _annotate(axes, max(metric.value, metric.high or 0.0), bar.height, label, style.ink())
    return f"{name}: {label}"


def _annotate(axes: Axes, x: float, y: float, label: str, colour: str) -> None:
    axes.annotate(label, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour)


def _dress(place: int) -> dict[str, Any]:
    """A system's colour and hatch."""
    rounds = place // len(style.PALETTE)
    return {
        "color": style.colour(place),
        "hatch": _HATCHES[rounds % len(_HATCHES)],
        "edgecolor": style.paper(),
    }


def _label(axes: Axes, bars: Sequence[_Bar]) -> None:
    """Each prompt length at the middle of its bars; room at the right for the longest label."""
    prompts = sorted({bar.row.cell.prompt for bar in bars})
    heights = [[bar.height for bar in bars if bar.row.cell.prompt == prompt] for prompt in prompts]
    axes.set_yticks([sum(each) / len(each) for each in heights], [f"prompt {prompt}" for prompt in prompts])
    axes.set_ylim(max(bar.height for bar in bars) + 0.7, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.28)


def _legend(axes: Axes, systems: Sequence[System]) -> None:
    """Every system once, also those without a bar in this plot."""
    for place, system in enumerate(systems):
        axes.barh(0.0, 0.0, label=str(system), **_dress(place))
