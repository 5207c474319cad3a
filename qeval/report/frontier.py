"""KL against bits per weight: each method's or model's frontier, and the noise floor, below which nothing is known."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qeval.report import formatting, style
from qeval.report.document import Plot
from qeval.report.model import Report, VariantReport
from qeval.report.plots import file_slug


def frontier(variants: Sequence[VariantReport]) -> list[VariantReport]:
    """Return the variants that no other of them beats in both bits and KL, the smallest first; all must have a KL."""
    front: list[VariantReport] = []
    for variant in sorted(variants, key=lambda v: (v.bits_per_weight, kl_of(v), v.name)):
        if not front or kl_of(variant) < kl_of(front[-1]):
            front.append(variant)
    return front


def kl_of(variant: VariantReport) -> float:
    """Return the mean KL in nats; infinite where there is none that a logarithmic axis can show."""
    metric = variant.metrics.get("kl_nats")
    return metric.value if metric is not None and metric.value is not None and metric.value > 0 else float("inf")


def by_method(report: Report) -> dict[str, list[VariantReport]]:
    """Return the variants that can be drawn, by method."""
    methods: dict[str, list[VariantReport]] = {}
    for variant in report.variants:
        if variant.ranked and not variant.void and kl_of(variant) < float("inf"):
            methods.setdefault(variant.method, []).append(variant)
    return methods


def frontiers(report: Report) -> Plot | None:
    """Draw KL against bits per weight; a method's frontier is joined, what another of it beats is hollow.

    None where no method has two variants.
    """
    methods = by_method(report)
    if max((len(variants) for variants in methods.values()), default=0) < 2:
        return None

    figure, axes = style.figure(4.2)
    for place, (method, variants) in enumerate(methods.items()):
        draw(axes, variants, place, method)
    floors = _floors([report])
    if floors:
        axes.axhline(max(floors), color=style.muted(), linestyle="--", linewidth=1.2, label="noise floor")

    svg, png = _finished(figure, axes, "KL from the baseline (nats)")
    drawn = ", ".join(f"{method} ({len(variants)})" for method, variants in methods.items())
    alt = f"{report.model.name}: KL against bits per weight of {drawn}; lines join each method's frontier."
    floor = f" The noise floor lies at {max(floors):.1e} nats." if floors else " No noise floor was measured."
    return Plot(
        f"frontier-{file_slug(report.model.name)}",
        f"{report.model.name}: each method's frontier",
        alt + floor,
        svg,
        png,
    )


def model_frontiers(reports: Sequence[Report]) -> Plot | None:
    """Draw KL against bits per weight of several models, each one's frontier over all methods joined."""
    drawable = {
        report.model.name: [v for variants in by_method(report).values() for v in variants] for report in reports
    }
    if len(reports) < 2 or sum(map(len, drawable.values())) < 2:
        return None
    figure, axes = style.figure(3.8)
    for place, (name, variants) in enumerate(drawable.items()):
        draw(axes, variants, place, name)
    svg, png = _finished(figure, axes, "KL from the own baseline (nats)")
    count, models = sum(map(len, drawable.values())), formatting.listed(list(drawable))
    alt = f"KL against bits per weight, {count} variants of {models}; lines join each frontier."
    floors = _floors(reports)
    floor = f" The noise floor lies at {max(floors):.1e} nats, where it was measured." if floors else ""
    return Plot("kl-bits", "KL against bits per weight", alt + floor, svg, png)


def draw(axes: Axes, variants: Sequence[VariantReport], place: int, label: str) -> None:
    """Draw variants with their intervals: their frontier joined, what another of them beats hollow."""
    front, colour, mark = frontier(variants), style.colour(place), style.marker(place)
    rest = [v for v in variants if v not in front]
    axes.plot(_bits(front), [kl_of(v) for v in front], f"{mark}-", color=colour, markersize=6, label=label)
    axes.plot(_bits(rest), [kl_of(v) for v in rest], mark, color=colour, markersize=5, markerfacecolor=style.paper())
    for v in variants:
        metric = v.metrics["kl_nats"]
        if metric.low is not None and metric.high is not None and metric.low > 0:
            axes.vlines(_ranked_bits(v), metric.low, metric.high, color=colour, linewidth=1.0, alpha=0.6)


def _floors(reports: Sequence[Report]) -> list[float]:
    """Return the KLs of the noise floors that were measured."""
    return [kl_of(v) for report in reports for v in report.variants if v.role == "floor" and kl_of(v) < float("inf")]


def _finished(figure: Figure, axes: Axes, loss: str) -> tuple[str, bytes]:
    axes.set_yscale("log")
    axes.set_xlabel("Bits per weight, over the quantized matrices")
    axes.set_ylabel(loss)
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=3)
    return style.save(figure)


def _bits(variants: Sequence[VariantReport]) -> list[float]:
    return [_ranked_bits(v) for v in variants]


def _ranked_bits(variant: VariantReport) -> float:
    if variant.bits_per_weight is None:
        raise ValueError(f"The bits of '{variant.name}' are not known, so it can't be ranked.")
    return variant.bits_per_weight
