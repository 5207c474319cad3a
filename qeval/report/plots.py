"""The report's plots, drawn from the Report alone. Each has a title, an alternative in words, SVG and PNG."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, NullLocator

from qeval.report import conventions, formatting, loss_breakdown, style
from qeval.report.build import quality
from qeval.report.document import Plot
from qeval.report.floors import largest_floor
from qeval.report.format_map import draw_formats, name_cells
from qeval.report.mix_tables import formats_of
from qeval.report.model import Metric, Report, Task, VariantReport
from qeval.report.part_tables import parts_bars
from qeval.report.plot_labels import label_points, plain_ticks
from qeval.report.style import Drawing
from qeval.report.tables import baseline_name
from qeval.stats.bootstrap import Floats

_ROW = 0.34  # inches a bar or dot row takes
_FAR_BELOW = 30  # a noise floor so many times below the lowest limit would leave the points no room
_LOG_FROM = 20  # ratio of largest to smallest above which an axis is logarithmic


def quality_against_size(report: Report) -> Drawing | None:
    """Draw KL (or the perplexity ratio) against size, the Pareto front joined; None below two variants."""
    points = [(i, v, q) for i, v in enumerate(report.variants) if (q := quality(v)) is not None]
    if len(points) < 2:
        return None
    name = "kl_nats" if "kl_nats" in points[0][1].metrics else "ppl_ratio"
    figure, axes = style.figure(3.2)
    front = sorted((v.ranked_bytes / 1e6, q) for _, v, q in points if v.pareto)
    axes.plot(*zip(*front, strict=True), color=style.muted(), linewidth=1.2, zorder=1, label="Pareto front")
    for index, variant, _ in points:
        _point(axes, variant.ranked_bytes / 1e6, variant.metrics[name], index, variant)
    if name == "kl_nats" and all(value > 0 for *_, value in points):
        axes.set_yscale("log")
    axes.set_xlabel("Size on disk (MB)")
    axes.set_ylabel("KL from the baseline (nats)" if name == "kl_nats" else conventions.RATIO)
    axes.grid(True)
    axes.margins(0.14)
    floor = _noise_floor(axes, report) if name == "kl_nats" else ""
    plain_ticks(axes.yaxis)

    # names at the points, with a legend in their place where they have no room
    places = [(v.ranked_bytes / 1e6, q, v.name) for _, v, q in points]
    intervals = [_interval_path(v.ranked_bytes / 1e6, v.metrics[name]) for _, v, _ in points]
    if not label_points(figure, axes, places, [*filter(None, intervals), Path(front)]):
        figure.legend(loc="outside lower center", ncols=2)
    filled = formatting.listed([v.name for _, v, _ in points if v.pareto])
    return Drawing(
        figure,
        "quality-size",
        "Quality against size",
        f"{axes.get_ylabel()} against size on disk, one point a variant with its 95 % interval. "
        f"Filled points are on the Pareto front: {filled}.{floor}",
    )


def kl_distribution(report: Report) -> Drawing | None:
    """Draw the share of tokens with at least a given KL; None where no variant has a KL above 0."""
    known = [(i, v, v.kl_curve) for i, v in enumerate(report.variants) if v.kl_curve is not None]
    curves = [(i, v, curve) for i, v, curve in known if max(curve.kl_nats) > 0]  # no logarithm holds a variant of none
    if not curves:
        return None

    figure, axes = style.figure(3.7)
    for index, variant, curve in curves:
        kl, share = np.asarray(curve.kl_nats), np.asarray(curve.share)
        seen = kl > 0
        axes.plot(
            kl[seen],
            share[seen],
            style.dash(index),
            color=style.colour(index),
            linewidth=1.6,
            label=variant.name,
        )

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("KL of a token (nats)")
    axes.set_ylabel("Share of tokens with at least that KL")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set_xlim(left=max(min(c.kl_nats[len(c.kl_nats) * 9 // 10] for *_, c in curves), 1e-9))
    plain_ticks(axes.xaxis)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=2)

    medians = [
        f"{v.name} {formatting.value_text(v.metrics['kl_nats_p50'])}, 99 % below "
        f"{formatting.value_text(v.metrics['kl_nats_p99'])}"
        for _, v, _ in curves
    ]
    return Drawing(
        figure,
        "kl-distribution",
        "Distribution of KL over tokens",
        f"Share of tokens with at least a given KL, both axes logarithmic. Medians in nats: {'; '.join(medians)}.",
    )


def perplexity_bars(report: Report) -> Drawing | None:
    """Draw the perplexity of the baseline and of every variant, with intervals; None where none was measured."""
    base = report.baseline.metrics.get("ppl")
    rows = [(v.name, v.metrics.get("ppl"), style.colour(i)) for i, v in enumerate(report.variants)]
    measured = [(name, m, c) for name, m, c in rows if m is not None and m.value is not None]
    if base is None or base.value is None or not measured:
        return None

    bars = [(baseline_name(report), base, style.muted()), *measured]
    figure, axes = style.figure(0.9 + _ROW * len(bars))
    values = [metric.value or 0.0 for _, metric, _ in bars]
    for row, (_, metric, colour) in enumerate(bars):
        axes.barh(row, values[row], height=0.62, color=colour, alpha=0.85)
        _whisker(axes, metric, row, style.ink())
        top = metric.high if metric.high is not None else values[row]
        axes.annotate(
            formatting.value_text(metric), (top, row), (4, 0), textcoords="offset points", va="center", fontsize=8
        )

    if max(values) > _LOG_FROM * min(values):
        axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * (2 if axes.get_xscale() == "log" else 1.12))
    _name_rows(axes, [name for name, _, _ in bars])
    axes.set_xlabel(f"{conventions.convention_title('ppl')}, lower is better")
    values_text = "; ".join(f"{name} {formatting.metric_text(metric)}" for name, metric, _ in bars)
    return Drawing(
        figure, "perplexity", "Perplexity", f"{conventions.convention_title('ppl')} with 95 % intervals: {values_text}."
    )


def accuracy_by_category(report: Report, task: Task) -> Drawing | None:
    """Draw the accuracy of every model in every category of a task; None where no model has any."""
    key = task.record.name
    models = [(baseline_name(report), report.baseline.tasks.get(key), style.ink(), "o")]
    models += [(v.name, v.tasks.get(key), style.colour(i), style.marker(i)) for i, v in enumerate(report.variants)]
    shown = [(name, r.by_category, c, m) for name, r, c, m in models if r is not None and r.by_category]
    if len(shown) < 2:
        return None

    # in each category the models, one below the other
    categories = list(shown[0][1])
    figure, axes = style.figure(1.5 + len(categories) * (0.24 + 0.13 * len(shown)))
    for place, (name, scores, colour, mark) in enumerate(shown):
        shift = (place - (len(shown) - 1) / 2) * 0.78 / len(shown)
        for row, category in enumerate(categories):
            metric = scores[category].acc
            _whisker(axes, metric, row + shift, colour, scale=100)
            axes.plot(
                100 * (metric.value or 0.0), row + shift, mark, color=colour, markersize=4.5,
                label=name if row == 0 else None,
            )  # fmt: skip

    axes.axvline(100 * task.chance, color=style.muted(), linestyle=":", linewidth=1.2, label="guessing")
    _name_rows(axes, [formatting.category(category) for category in categories])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))
    axes.set_xlabel(f"Accuracy, {task.record.title}")
    figure.legend(loc="outside lower center", ncols=2)
    remark = " The baseline's accuracy includes guessing." if task.baseline_at_chance else ""
    return Drawing(
        figure,
        f"{file_slug(key)}-categories",
        f"{task.record.title} by category",
        f"Accuracy by category with 95 % intervals, {len(shown)} models in {len(categories)} categories; the "
        f"table holds the numbers.{remark}",
    )


def layer_map(index: int, variant: VariantReport) -> Drawing | None:
    """Draw layers by kind of linear: sensitivity as colour, the high bit width as a dot; None without a mix.

    In a mix of formats the colour is that of the format, with a mark in the cell.
    """
    if variant.mix is None:
        return None
    groups = variant.mix.groups
    if formats := formats_of(groups):
        return Drawing(
            draw_formats(groups, formats),
            f"layers-{index + 1}-{file_slug(variant.name)}",
            f"{variant.name}: the format of each group",
            "Layers down, kinds of linears across; colour and mark are the format: "
            + ", ".join(f"{name} {sum(group.format == name for group in groups)}" for name in formats)
            + f" of {len(groups)} groups.",
        )
    kinds = list(dict.fromkeys(group.kind for group in groups))
    layers = sorted({group.layer for group in groups})

    # the sensitivity of each group
    alone = np.full((len(layers), len(kinds)), np.nan)
    for group in groups:
        alone[layers.index(group.layer), kinds.index(group.kind)] = np.nan if group.kl_low is None else group.kl_low
    figure, axes = style.figure(min(1.6 + 0.155 * len(layers), 9.5))
    low, high = min(g.bits for g in groups), max(g.bits for g in groups)
    draw_heat(figure, axes, kinds, layers, alone, f"KL with this group alone at INT{low} (nats)")

    # a dot at each group of the high width
    measured = np.isfinite(alone).any()
    chosen = [(kinds.index(g.kind), layers.index(g.layer)) for g in groups if g.bits == high and high > low]
    if chosen:
        axes.scatter(
            [kind for kind, _ in chosen],
            [layer for _, layer in chosen],
            s=26,
            color="#ffffff",
            edgecolors="#000000",
            linewidths=0.9,
            label=f"INT{high}",
        )
        figure.legend(loc="outside lower center")

    return Drawing(
        figure,
        f"layers-{index + 1}-{file_slug(variant.name)}",
        f"{variant.name}: where INT{high} went",
        f"Layers down, kinds of linears across; a dot marks INT{high}: {len(chosen)} of {len(groups)}. "
        + ("Colour is the KL with that group alone at the low width." if measured else "Chosen by position."),
    )


def draw_heat(
    figure: Figure, axes: Axes, kinds: Sequence[str], layers: Sequence[int], values: Floats, label: str
) -> None:
    """Draw layers down and kinds of linears across: `values` [layers, kinds] as colours; NaN where there is none.

    Where some are below zero the colours part there, and run alike to both sides.
    """
    measured = values[np.isfinite(values)]
    edges = np.arange(len(kinds) + 1) - 0.5, np.arange(len(layers) + 1) - 0.5
    image = axes.pcolormesh(
        *edges,
        np.ma.masked_invalid(values),
        cmap="PuOr_r" if measured.size and measured.min() < 0 else "cividis",
        norm=_norm(measured),
        edgecolors=style.paper(),
        linewidth=0.6,
    )
    if measured.size:
        figure.colorbar(image, ax=axes, pad=0.03).set_label(label)
    else:
        axes.set_facecolor(style.grid())

    name_cells(axes, kinds, layers)


def all_plots(report: Report) -> list[Plot]:
    """Draw every plot that the report's content allows."""
    drawn: list[Callable[[], Drawing | None]] = [
        partial(quality_against_size, report),
        partial(kl_distribution, report),
        partial(perplexity_bars, report),
        partial(loss_breakdown.bars, report),
        partial(parts_bars, report),
        *(partial(accuracy_by_category, report, task) for task in report.tasks),
        *(partial(layer_map, index, variant) for index, variant in enumerate(report.variants)),
    ]
    with style.styled():
        return [drawing.plot() for draw in drawn if (drawing := draw()) is not None]


def file_slug(name: str) -> str:
    """Return a name as part of a file's name.

    >>> file_slug("mixed-rtn:4.8bpw")
    'mixed-rtn-4.8bpw'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "unnamed"


def _point(axes: Axes, x: float, metric: Metric, index: int, variant: VariantReport) -> None:
    """Draw a variant: filled when it is on the front, hollow when not."""
    value = metric.value or 0.0
    if metric.low is not None and metric.high is not None:
        axes.vlines(x, metric.low, metric.high, color=style.colour(index), linewidth=1.4, zorder=2)
    axes.plot(
        x, value, style.marker(index), color=style.colour(index), markersize=7, zorder=3, label=variant.name,
        markerfacecolor=style.colour(index) if variant.pareto else style.paper(), linestyle="none",
    )  # fmt: skip


def _interval_path(x: float, metric: Metric) -> Path | None:
    """Return the interval of a point as a line; None where there is none."""
    if metric.low is None or metric.high is None:
        return None
    return Path([(x, metric.low), (x, metric.high)])


def _noise_floor(axes: Axes, report: Report) -> str:
    """Draw the noise floor as a line, or name it at the lower edge where it lies far below; return it in words."""
    floor = largest_floor(report.variants)
    if floor is None or floor[1].value is None:
        return ""
    value, size = floor[1].value, formatting.value_text(floor[1])
    text = f"noise floor {size}"
    style_of_text: dict[str, Any] = {"fontsize": 8, "color": style.muted(), "ha": "right"}
    if axes.get_yscale() == "log" and value * _FAR_BELOW < axes.get_ylim()[0]:
        axes.annotate(f"{text}, below", (0.99, 0.02), xycoords="axes fraction", va="bottom", **style_of_text)
    else:
        axes.axhline(value, color=style.muted(), linestyle="--", linewidth=1.2, zorder=1, label="noise floor")
        axes.annotate(
            text, (0.99, value), (0, 2), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="bottom",
            **style_of_text,
        )  # fmt: skip
    return f" The noise floor is {size} nats."


def _whisker(axes: Axes, metric: Metric, row: float, colour: str, scale: float = 1.0) -> None:
    if metric.low is not None and metric.high is not None:
        axes.hlines(row, scale * metric.low, scale * metric.high, color=colour, linewidth=1.2)


def _name_rows(axes: Axes, names: list[str]) -> None:
    """Name rows from the top down, with lines to read along."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")


def _norm(values: Floats) -> Normalize | None:
    """Return a logarithmic scale where values need and allow it; to both sides of zero where they stand on both."""
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if low < 0:
        reach = max(-low, high)
        return SymLogNorm(reach / _LOG_FROM, vmin=-reach, vmax=reach)
    return LogNorm(low, high) if low > 0 and high > _LOG_FROM * low else Normalize(low, high)
