"""Which layer hurts, on a page: the KL of every group alone and of all but it, as heat maps, tables and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qeval.report import style, words
from qeval.report.page import Cell, Heading, Plot, Section, Table
from qeval.report.plots import draw_heat, slug
from qeval.report.render import page, write_plots
from qeval.store.atomic import write_text

ADDITIVE = (0.8, 1.2)
"""Between these the sum of the single KLs is near the joint one, and a table of them can be read group by group."""


@dataclass(frozen=True)
class GroupEffect:
    """One group of linears: mean KL in nats with it alone quantized, and with all but it."""

    layer: int
    kind: str
    names: tuple[str, ...]
    parameters: int
    alone_kl_nats: float
    without_kl_nats: float


@dataclass(frozen=True)
class Pick:
    """What the integer programme gives the high width within a size: (layer, kind), and the KL that it predicts."""

    budget: float
    bits_per_weight: float
    predicted_kl_nats: float
    high: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Sensitivities:
    """All that was measured: on how many positions of which text, under which grid."""

    model: str
    method: str
    calibration: str
    positions: int
    joint_kl_nats: float
    groups: tuple[GroupEffect, ...]
    picks: tuple[Pick, ...]

    @property
    def additivity(self) -> float | None:
        """The sum of the single KLs over the joint one; None where that is zero."""
        total = sum(group.alone_kl_nats for group in self.groups)
        return total / self.joint_kl_nats if self.joint_kl_nats > 0 else None

    @property
    def adds_up(self) -> bool:
        """Whether the single KLs nearly add up to the joint one."""
        return self.additivity is not None and ADDITIVE[0] <= self.additivity <= ADDITIVE[1]


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
        (found.method, f"{found.positions:,} positions of {found.calibration}"),
        warnings=() if found.adds_up else (_no_sum(found),),
    )
    write_text(out / "sensitivity.md", page("report.md.j2", heading, [section]))
    write_text(out / "sensitivity.html", page("report.html.j2", heading, [section]))
    write_text(out / "sensitivity.json", sensitivity_json(found))
    return out / "sensitivity.html"


def sensitivity_json(found: Sensitivities) -> str:
    """The text of `sensitivity.json`."""
    data = {"schema_version": 1, **asdict(found), "additivity": found.additivity, "adds_up": found.adds_up}
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def groups_table(found: Sensitivities, most: int | None = None) -> Table:
    """The groups, the one that costs most alone first; `most` shows so many."""
    ranked = sorted(found.groups, key=lambda group: -group.alone_kl_nats)[:most]
    rows = [
        (
            Cell(f"Layer {group.layer} {group.kind}"),
            Cell(f"{group.parameters:,}"),
            Cell(f"{group.alone_kl_nats:.4g}"),
            Cell(f"{group.without_kl_nats:.4g}"),
            Cell(f"{found.joint_kl_nats - group.without_kl_nats:.4g}".replace("-", words.MINUS)),
        )
        for group in ranked
    ]
    columns = ("Group", "Weights", "KL, it alone, nats", "KL, all but it, nats", "KL saved by leaving it, nats")
    note = "Saved: the KL of all groups quantized, less that of all but this one. Below zero, its error undoes others'."
    return Table("Every group of linears", columns, tuple(rows), note, live=True)


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
    note = "The sum of the single KLs is what the choice minimizes; it is a prediction only where they add up."
    return Table("What mixed precision picks at each size", columns, tuple(rows), note)


def _listed(high: Sequence[tuple[int, str]]) -> str:
    kinds = dict.fromkeys(kind for _, kind in high)
    told = [f"{kind} {words.spans(sorted(layer for layer, k in high if k == kind))}" for kind in kinds]
    return "; ".join(told) or "none"


def _sentences(found: Sensitivities) -> tuple[str, ...]:
    worst = max(found.groups, key=lambda group: group.alone_kl_nats)
    told = [
        f"All groups quantized by {found.method}: KL {found.joint_kl_nats:.4g} nats. The group that costs most alone "
        f"is layer {worst.layer} {worst.kind}, {worst.alone_kl_nats:.4g} nats."
    ]
    if found.adds_up:
        told.append(f"The single KLs sum to {found.additivity:.2f} times the joint one: they nearly add up.")
    return (*told, *(() if found.adds_up else (_no_sum(found),)))


def _no_sum(found: Sensitivities) -> str:
    if found.additivity is None:
        return "All groups together lose nothing that could be measured, so no group's share of it can be told."
    return (
        f"The single KLs sum to {found.additivity:.2f} times the joint one (between {ADDITIVE[0]} and {ADDITIVE[1]} "
        "would be near): a table of them, group by group, misleads; trust what leaving a group in float saves, and a "
        "mix only as measured whole."
    )


def _map(found: Sensitivities, what: str) -> Plot:
    """Layer by kind of linear, coloured by the KL alone or by what leaving the group in float saves."""
    kinds = list(dict.fromkeys(group.kind for group in found.groups))
    layers = sorted({group.layer for group in found.groups})
    values = np.full((len(layers), len(kinds)), np.nan)
    for group in found.groups:
        value = group.alone_kl_nats if what == "alone" else found.joint_kl_nats - group.without_kl_nats
        values[layers.index(group.layer), kinds.index(group.kind)] = value
    label = "KL with this group alone quantized" if what == "alone" else "KL saved by leaving this group in float"
    made, axes = style.figure(min(1.6 + 0.155 * len(layers), 9.5))
    draw_heat(made, axes, kinds, layers, values, f"{label} (nats)")
    svg, png = style.save(made)
    alt = f"{found.model}, {found.method}: layers down, kinds of linears across; colour is the {label}, in nats."
    return Plot(f"sensitivity-{slug(what)}", label, alt, svg, png)
