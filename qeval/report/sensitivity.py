"""The sensitivity page: the KL of every group alone and of all but it, as heat maps, tables and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from qeval.files.atomic import write_text
from qeval.report import formatting, style
from qeval.report.document import Heading, Plot, Section, Table, TableCell, metric_cell
from qeval.report.model import Metric
from qeval.report.plots import draw_heat, file_slug
from qeval.report.render import html_page, write_plots
from qeval.stats.bootstrap import FEW_CLUSTERS
from qeval.types import Estimate

ADDITIVE = (0.8, 1.2)
"""Between these the sum of the single KLs is near the joint one, and a table of them can be read group by group."""

_PICKED = (
    "Chosen on the sequences that a mixed method measures on, so that it picks the same. The sum of the single KLs "
    "is what the choice minimizes; it is a prediction only where they add up."
)


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
    """The groups, as (layer, kind), that a mix gives the high width within a size, and the KL that it predicts.

    `formats`: of a mix of formats, the groups that get each.
    """

    budget: float
    bits_per_weight: float
    predicted_kl_nats: float
    high: tuple[tuple[int, str], ...]
    formats: Mapping[str, tuple[tuple[int, str], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class FormatKls:
    """The KL in nats of one group alone in each format, on the sequences that a mix measures on."""

    layer: int
    kind: str
    kls: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivities:
    """All that was measured: on how many positions of which text, under which grid.

    `joint` is the KL in nats with all groups quantized, `additivity` the sum of the single KLs over it. `by_format`:
    the groups in each of several formats, where a mix is to choose among them.
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
    by_format: tuple[FormatKls, ...] = ()

    @property
    def adds_up(self) -> bool:
        """Return whether the single KLs nearly add up to the joint one."""
        return self.additivity.value is not None and ADDITIVE[0] <= self.additivity.value <= ADDITIVE[1]


def write_sensitivity(effects: Sensitivities, out: Path) -> Path:
    """Write sensitivity.json, .md, .html and the plots; where the page is."""
    with style.styled():
        plots = [_map(effects, "alone"), _map(effects, "gain")]
    write_plots(plots, out)

    section = Section(
        id="sensitivity",
        title="What each group costs",
        sentences=_sentences(effects),
        plots=tuple(plots),
        tables=(groups_table(effects), *_mix_tables(effects)),
    )
    heading = Heading(
        f"{effects.model}: which layer hurts",
        (effects.method, f"{effects.positions:,} positions in {effects.sequences} sequences of {effects.calibration}"),
    )

    write_text(out / "sensitivity.md", html_page("report.md.j2", heading, [section]))
    write_text(out / "sensitivity.html", html_page("report.html.j2", heading, [section]))
    write_text(out / "sensitivity.json", sensitivity_json(effects))
    return out / "sensitivity.html"


def sensitivity_json(effects: Sensitivities) -> str:
    """Return the text of `sensitivity.json`."""
    data = {"schema_version": 1, **asdict(effects), "adds_up": effects.adds_up}
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def groups_table(effects: Sensitivities, most: int | None = None) -> Table:
    """Return the groups, the one that costs most alone first; `most` shows so many."""
    ranked = sorted(effects.groups, key=_alone, reverse=True)[:most]
    rows = [
        (
            TableCell(f"Layer {group.layer} {group.kind}"),
            TableCell(f"{group.parameters:,}"),
            *(metric_cell(Metric.of(each)) for each in (group.alone, group.without, group.saved)),
        )
        for group in ranked
    ]
    columns = ("Group", "Weights", "KL, it alone, nats", "KL, all but it, nats", "KL saved by leaving it, nats")
    note = (
        "Saved: the KL of all groups quantized, less that of all but this one, sequence by sequence. Below zero, its "
        f"error undoes others'. {_intervals(effects)}"
    )
    return Table("Every group of linears", columns, tuple(rows), note, live=True)


def _alone(group: GroupEffect) -> float:
    return group.alone.value or 0.0


def _intervals(effects: Sensitivities) -> str:
    if effects.sequences < 2:
        return "One sequence gives no intervals."
    rough = ": so few make it rough" if effects.sequences < FEW_CLUSTERS else ""
    return f"Intervals: 95 %, bootstrap over the {effects.sequences} sequences{rough}."


def _mix_tables(effects: Sensitivities) -> list[Table]:
    if effects.by_format:
        return [formats_table(effects), format_picks_table(effects)]
    return [picks_table(effects)] if effects.picks else []


def formats_table(effects: Sensitivities) -> Table:
    """Return the table of every group alone in each format, the one that costs most in the smallest first."""
    names = list(effects.by_format[0].kls)
    ranked = sorted(effects.by_format, key=lambda group: -group.kls[names[0]])
    rows = [
        (TableCell(f"Layer {group.layer} {group.kind}"), *(TableCell(f"{group.kls[name]:.3g}") for name in names))
        for group in ranked
    ]
    columns = ("Group", *(f"KL in {name}, nats" for name in names))
    note = "Measured on the sequences that a mixed method measures on."
    return Table("Every group alone in each format", columns, tuple(rows), note, live=True)


def format_picks_table(effects: Sensitivities) -> Table:
    """Return the table of the groups that a mix of formats gives each format at each size."""
    names = list(effects.picks[0].formats)
    rows = [
        (
            TableCell(f"{pick.budget:.2f}"),
            TableCell(f"{pick.bits_per_weight:.3f}"),
            TableCell(f"{pick.predicted_kl_nats:.4g}"),
            *(TableCell(_listed(pick.formats[name])) for name in names),
        )
        for pick in effects.picks
    ]
    columns = ("Budget, bits/weight", "Bits/weight", "Summed KL, nats", *names)
    return Table("What a mix of formats picks at each size", columns, tuple(rows), _PICKED)


def picks_table(effects: Sensitivities) -> Table:
    """Return the table of what mixed precision would pick at each size."""
    rows = [
        (
            TableCell(f"{pick.budget:.2f}"),
            TableCell(f"{pick.bits_per_weight:.3f}"),
            TableCell(f"{len(pick.high)} of {len(effects.groups)}"),
            TableCell(f"{pick.predicted_kl_nats:.4g}"),
            TableCell(_listed(pick.high)),
        )
        for pick in effects.picks
    ]
    columns = ("Budget, bits/weight", "Bits/weight", "Groups at the high width", "Summed KL, nats", "Which")
    return Table("What mixed precision picks at each size", columns, tuple(rows), _PICKED)


def _listed(high: Sequence[tuple[int, str]]) -> str:
    kinds = dict.fromkeys(kind for _, kind in high)
    parts = [f"{kind} {formatting.spans(sorted(layer for layer, k in high if k == kind))}" for kind in kinds]
    return "; ".join(parts) or "none"


def _sentences(effects: Sensitivities) -> tuple[str, ...]:
    worst = max(effects.groups, key=_alone)
    sentences = [
        f"All groups quantized by {effects.method}: KL {_text(effects.joint)} nats. The group that costs most "
        f"alone is layer {worst.layer} {worst.kind}, {_text(worst.alone)} nats."
    ]
    if effects.adds_up:
        sentences.append(f"The single KLs sum to {_text(effects.additivity)} times the joint one: they nearly add up.")
    return (*sentences, *(() if effects.adds_up else (_no_sum(effects),)))


def verdict(effects: Sensitivities) -> str:
    """Return the joint KL, and whether the single ones add up to it, in a line."""
    ratio = "none: nothing was lost" if effects.additivity.value is None else _text(effects.additivity)
    line = f"KL of all groups together {_text(effects.joint)} nats; sum of the single ones over it: {ratio}"
    return line + ("" if effects.adds_up else " (they do not add up)")


def _text(estimate: Estimate) -> str:
    return formatting.metric_text(Metric.of(estimate))


def _no_sum(effects: Sensitivities) -> str:
    if effects.additivity.value is None:
        return "All groups together lose nothing that could be measured, so no group's share of it can be told."
    return (
        f"The single KLs sum to {_text(effects.additivity)} times the joint one (between {ADDITIVE[0]} and "
        f"{ADDITIVE[1]} would be near): a table of them, group by group, misleads; trust what leaving a group in float "
        "saves, and a mix only as measured whole."
    )


def _map(effects: Sensitivities, what: str) -> Plot:
    """Draw layers by kind of linear, coloured by the KL alone or by what leaving the group in float saves."""
    kinds = list(dict.fromkeys(group.kind for group in effects.groups))
    layers = sorted({group.layer for group in effects.groups})
    cells = {
        (layers.index(g.layer), kinds.index(g.kind)): g.alone if what == "alone" else g.saved for g in effects.groups
    }
    values = np.full((len(layers), len(kinds)), np.nan)
    for at, estimate in cells.items():
        values[at] = np.nan if estimate.value is None else estimate.value

    label = "KL with this group alone quantized" if what == "alone" else "KL saved by leaving this group in float"
    figure, axes = style.figure(min(1.6 + 0.155 * len(layers), 9.5))
    draw_heat(figure, axes, kinds, layers, values, f"{label} (nats)")
    if what == "gain":
        for down, across in (at for at, estimate in cells.items() if (estimate.low or 0) > 0):
            axes.plot(across, down, "o", color=style.ink(), markersize=2.2)
        label += " (a dot: its interval lies above zero)"

    svg, png = style.save(figure)
    alt = f"{effects.model}, {effects.method}: layers down, kinds of linears across; colour is the {label}, in nats."
    return Plot(f"sensitivity-{file_slug(what)}", label, alt, svg, png)
