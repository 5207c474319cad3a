"""Tables of a mixed variant: what went where, and the sensitivities that the choice rests on."""

from collections.abc import Sequence

from qeval.report import formatting
from qeval.report.document import Table, TableCell
from qeval.report.model import VariantReport
from qeval.store.run import GroupRecord

_SENSITIVE_SHOWN = 10


def formats_of(groups: Sequence[GroupRecord]) -> list[str]:
    """Return the formats that the groups of a mix got, the fewest bits first; none in a mix of two widths."""
    bits = {group.format: group.bits for group in groups if group.format is not None}
    return sorted(bits, key=lambda name: (bits[name], name))


def mix_table(variant: VariantReport) -> Table:
    """Return the table of the layers of a mixed variant that got the high bit width, or each format, by kind."""
    groups = variant.mix.groups if variant.mix else []
    if formats := formats_of(groups):
        return _format_table(variant.name, groups, formats)
    high = max((group.bits for group in groups), default=0)
    low = min((group.bits for group in groups), default=0)
    rows = []
    for kind in dict.fromkeys(group.kind for group in groups):
        layers = sorted(g.layer for g in groups if g.kind == kind and g.bits == high and high > low)
        total = sum(g.kind == kind for g in groups)
        rows.append(
            (TableCell(kind), TableCell(f"{len(layers)} of {total}"), TableCell(formatting.spans(layers) or "none"))
        )
    columns = ("Linears", f"Groups at INT{high}", f"Layers at INT{high}")
    return Table(f"{variant.name}: what went to INT{high}", columns, tuple(rows))


def sensitive_table(variant: VariantReport) -> Table | None:
    """Return the groups whose quantization alone costs most; None where nothing was measured."""
    groups = variant.mix.groups if variant.mix else []
    measured = sorted(
        ((group.kl_low, group) for group in groups if group.kl_low is not None), key=lambda pair: -pair[0]
    )
    if not measured:
        return None
    if formats_of(groups):
        return _format_kls_table(variant.name, [group for _, group in measured])

    low = min(group.bits for group in groups)
    rows = [
        (
            TableCell(f"Layer {group.layer} {group.kind}"),
            TableCell(f"{alone:.3g}"),
            TableCell(formatting.MISSING if group.kl_high is None else f"{group.kl_high:.3g}"),
            TableCell(f"INT{group.bits}", remark="below the noise floor" if group.sensitivity_floor else None),
        )
        for alone, group in measured[:_SENSITIVE_SHOWN]
    ]
    columns = ("Group", f"KL alone at INT{low}, nats", "KL alone at the high width, nats", "Choice")
    caption = f"{variant.name}: the {len(rows)} most sensitive of {len(measured)} groups"
    return Table(caption, columns, tuple(rows))


def _format_table(name: str, groups: Sequence[GroupRecord], formats: Sequence[str]) -> Table:
    """Return the layers at each format, by kind, and how many groups have it."""
    rows = []
    for kind in dict.fromkeys(group.kind for group in groups):
        layers = [sorted(g.layer for g in groups if g.kind == kind and g.format == each) for each in formats]
        rows.append((TableCell(kind), *(TableCell(formatting.spans(each) or "none") for each in layers)))
    counts = [sum(group.format == each for group in groups) for each in formats]
    rows.append((TableCell("all groups"), *(TableCell(f"{count} of {len(groups)}") for count in counts)))
    return Table(f"{name}: the layers at each format", ("Linears", *formats), tuple(rows))


def _format_kls_table(name: str, measured: Sequence[GroupRecord]) -> Table:
    """Return the KL alone on every grid of the groups that cost most on the smallest one."""
    grids = list(dict.fromkeys(grid for group in measured for grid in group.kls))
    rows = [
        (
            TableCell(f"Layer {group.layer} {group.kind}"),
            *(TableCell(f"{group.kls[grid]:.3g}") for grid in grids),
            TableCell(group.format or formatting.MISSING),
        )
        for group in measured[:_SENSITIVE_SHOWN]
    ]
    columns = ("Group", *(f"KL alone in {grid}, nats" for grid in grids), "Choice")
    return Table(f"{name}: the {len(rows)} most sensitive of {len(measured)} groups", columns, tuple(rows))
