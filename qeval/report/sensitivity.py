"""Which layer hurts, on a page: the KL of every group alone and of all but it, as heat maps, tables and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qeval.report import style, words
from qeval.report.model import Metric
from qeval.report.page import Cell, Heading, Plot, Section, Table, metric_cell
from qeval.report.plots import draw_heat, slug
from qeval.report.render import page, write_plots
from qeval.stats.bootstrap import FEW_CLUSTERS
from qeval.store.atomic import write_text
from qeval.types import Estimate

ADDITIVE = (0.8, 1.2)
"""Between these the sum of the single KLs is near the joint one, and a table of them can be read group by group."""


@dataclass(frozen=True)
class GroupEffect:
    """One group of linears: mean KL in nats with it alone quantized, with all but it, and what leaving it out saves."""

    layer: int
    kind: str
    names: tuple[str, ...]
    parameters: int
    alone: Estimate
    without: Estimate
    saved: Estimate


@dataclass(frozen=True)
class Pick:
    """What the integer programme gives the high width within a size: (layer, kind), and the KL that it predicts."""

    budget: float
    bits_per_weight: float
    predicted_kl_nats: float
    high: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Sensitivities:
    """All that was measured: on how many positions of which text, under which grid.

    `joint` is the KL in nats with all groups quantized, `additivity` the sum of the single KLs over it.
    """

    model: str
    method: str
    calibration: str
    sequences: int
    positions: int
    joint: Estimate
    additivity: Estimate
    groups: tuple[GroupEffect, ...]
    picks: tuple[Pick, ...]

    @property
    def adds_up(self) -> bool:
        """Whether the single KLs nearly add up to the joint one."""
        return self.additivity.value is not None and ADDITIVE[0] <= self.additivity.value <= ADDITIVE[1]


def write_sensitivity(found: Sensitivities, out: Path) -> Path:
    """Write sensitivity.json, .md, .html and the plots; where the page is."""
    with style.styled():
        plots = [_map(found, "alone"), _map(found, "gain")]
    write_plots(plots, out)
    section = Section(
        id="sensitivity",
        title="What each group costs",
        sentences=_sentences(found),
        plots=tuple(plots),
        tables=(groups_table(found), *([picks_table(found)] if found.picks else [])),
    )
    heading = Heading(
        f"{found.model}: which layer hurts",
        (found.method, f"{found.positions:,} positions in {found.sequences} sequences of {found.calibration}"),
        warnings=() if found.adds_up else (_no_sum(found),),
    )
    write_text(out / "sensitivity.md", page("report.md.j2", heading, [section]))
    write_text(out / "sensitivity.html", page("report.html.j2", heading, [section]))
    write_text(out / "sensitivity.json", sensitivity_json(found))
    return out / "sensitivity.html"


def sensitivity_json(found: Sensitivities) -> str:
    """The text of `sensitivity.json`."""
    data = {"schema_version": 1, **asdict(found), "adds_up": found.adds_up}
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def groups_table(found: Sensitivities, most: int | None = None) -> Table:
    """The groups, the one that costs most alone first; `most` shows so many."""
    ranked = sorted(found.groups, key=_alone, reverse=True)[:most]
    rows = [
        (
            Cell(f"Layer {group.layer} {group.kind}"),
            Cell(f"{group.parameters:,}"),
            *(metric_cell(Metric.of(each)) for each in (group.alone, group.without, group.saved)),
        )
        for group in ranked
    ]
    columns = ("Group", "Weights", "KL, it alone, nats", "KL, all but it, nats", "KL saved by leaving it, nats")
    note = (
        "Saved: the KL of all groups quantized, less that of all but this one, sequence by sequence. Below zero, its "
        f"error undoes others'. {_intervals(found)}"
    )
    return Table("Every group of linears", columns, tuple(rows), note, live=True)


def _alone(group: GroupEffect) -> float:
    return group.alone.value or 0.0


def _intervals(found: Sensitivities) -> str:
    if found.sequences < 2:
        return "One sequence gives no intervals."
    rough = ": so few make it rough" if found.sequences < FEW_CLUSTERS else ""
    return f"Intervals: 95 %, bootstrap over the {found.sequences} sequences{rough}."


def picks_table(found: Sensitivities) -> Table:
    """What mixed precision would pick at each size."""
    rows = [
        (
            Cell(f"{pick.budget:.2f}"),
            Cell(f"{pick.bits_per_weight:.3f}"),
            Cell(f"{len(pick.high)} of {len(found.groups)}"),
            Cell(f"{pick.predicted_kl_nats:.4g}"),
            Cell(_listed(pick.high)),
        )
        for pick in found.picks
    ]
    columns = ("Budget, bits/weight", "Bits/weight", "Groups at the high width", "Summed KL, nats", "Which")
    note = (
        "Chosen on the sequences that a mixed method measures on, so that it picks the same. The sum of the single KLs "
        "is what the choice minimizes; it is a prediction only where they add up."
    )
    return Table("What mixed precision picks at each size", columns, tuple(rows), note)


def _listed(high: Sequence[tuple[int, str]]) -> str:
    kinds = dict.fromkeys(kind for _, kind in high)
    told = [f"{kind} {words.spans(sorted(layer for layer, k in high if k == kind))}" for kind in kinds]
    return "; ".join(told) or "none"


def _sentences(found: Sensitivities) -> tuple[str, ...]:
    worst = max(found.groups, key=_alone)
    told = [
        f"All groups quantized by {found.method}: KL {_told(found.joint)} nats. The group that costs most alone "
        f"is layer {worst.layer} {worst.kind}, {_told(worst.alone)} nats."
    ]
    if found.adds_up:
        told.append(f"The single KLs sum to {_told(found.additivity)} times the joint one: they nearly add up.")
    return (*told, *(() if found.adds_up else (_no_sum(found),)))


def verdict(found: Sensitivities) -> str:
    """The joint KL, and whether the single ones add up to it, in a line."""
    ratio = "none: nothing was lost" if found.additivity.value is None else _told(found.additivity)
    line = f"KL of all groups together {_told(found.joint)} nats; sum of the single ones over it: {ratio}"
    return line + ("" if found.adds_up else " (they do not add up)")


def _told(estimate: Estimate) -> str:
    return words.metric_text(Metric.of(estimate))


def _no_sum(found: Sensitivities) -> str:
    if found.additivity.value is None:
        return "All groups together lose nothing that could be measured, so no group's share of it can be told."
    return (
        f"The single KLs sum to {_told(found.additivity)} times the joint one (between {ADDITIVE[0]} and {ADDITIVE[1]} "
        "would be near): a table of them, group by group, misleads; trust what leaving a group in float saves, and a "
        "mix only as measured whole."
    )


def _map(found: Sensitivities, what: str) -> Plot:
    """Layer by kind of linear, coloured by the KL alone or by what leaving the group in float saves."""
    kinds = list(dict.fromkeys(group.kind for group in found.groups))
    layers = sorted({group.layer for group in found.groups})
    cells = {
        (layers.index(g.layer), kinds.index(g.kind)): g.alone if what == "alone" else g.saved for g in found.groups
    }
    values = np.full((len(layers), len(kinds)), np.nan)
    for at, estimate in cells.items():
        values[at] = np.nan if estimate.value is None else estimate.value
    label = "KL with this group alone quantized" if what == "alone" else "KL saved by leaving this group in float"
    made, axes = style.figure(min(1.6 + 0.155 * len(layers), 9.5))
    draw_heat(made, axes, kinds, layers, values, f"{label} (nats)")
    if what == "gain":
        for down, across in (at for at, estimate in cells.items() if (estimate.low or 0) > 0):
            axes.plot(across, down, "o", color=style.ink(), markersize=2.2)
        label += " (a dot: its interval lies above zero)"
    svg, png = style.save(made)
    alt = f"{found.model}, {found.method}: layers down, kinds of linears across; colour is the {label}, in nats."
    return Plot(f"sensitivity-{slug(what)}", label, alt, svg, png)
