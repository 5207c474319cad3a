"""Tables and bars of a variant's loss by part: weights, activations, keys and values alone; and by position."""

from collections.abc import Iterator

from qeval.report.document import NOTHING, Table, TableCell, metric_cell
from qeval.report.loss_breakdown import StackedRow, kl_cell, stacked_bars
from qeval.report.model import Metric, PositionBucket, Report, VariantReport
from qeval.report.style import Drawing

_LABELS = {"weights": "Weights", "activations": "Activations", "keys": "Keys", "values": "Values"}
_NOTE = (
    "Each part alone: the variant's weights without the rest, and its activations, keys or values on the baseline's "
    "weights. All on the same tokens. Sum over all: 1 where the losses add up, less where parts lose more together. "
    "A dash: the variant has no such part, or the part is nothing by itself (activations of a method that folds "
    "scales into the weights)."
)
_POSITIONS_NOTE = (
    "Positions are counted in their window, from 0. An error of keys and values grows with the tokens that attention "
    "reads."
)


def parts_table(report: Report) -> Iterator[Table]:
    """Yield KL by part, where some variant's parts were scored."""
    if split := [variant for variant in report.variants if variant.parts]:
        columns = ("Variant", *(f"{label}, nats" for label in _LABELS.values()), "Sum over all", "All, nats")
        yield Table("KL by part", columns, tuple(_row(report, variant) for variant in split), _NOTE)


def positions_table(report: Report) -> Iterator[Table]:
    """Yield KL by position, where windows are long enough."""
    rows = {variant.name: variant.kl_by_position for variant in report.variants if variant.kl_by_position}
    if not rows:
        return
    ends = sorted({(bucket.first, bucket.last) for buckets in rows.values() for bucket in buckets})
    columns = ("Variant", *(f"{first:,} to {last:,}, nats" for first, last in ends))
    cells = tuple((TableCell(name), *_by_end(buckets, ends)) for name, buckets in rows.items())
    yield Table("KL by position", columns, cells, _POSITIONS_NOTE, folded=True)


def parts_bars(report: Report) -> Drawing | None:
    """Draw the KLs of every variant's parts, stacked, and that of all together as a tick; None where none was split."""
    rows = []
    for variant in report.variants:
        shares = [_share(report, variant, part) for part in _LABELS]
        whole = variant.metrics.get("kl_nats")
        if variant.parts and whole is not None and whole.value is not None:
            rows.append(StackedRow(variant.name, tuple(shares), whole))
    return stacked_bars(rows, tuple(_LABELS.values()), "parts", "Which part loses how much")


def _row(report: Report, variant: VariantReport) -> tuple[TableCell, ...]:
    shares = (_share(report, variant, part) for part in _LABELS)
    return (
        TableCell(variant.name),
        *(NOTHING if share is None else kl_cell(share) for share in shares),
        metric_cell(variant.parts_over_joint),
        metric_cell(variant.metrics.get("kl_nats")),
    )


def _share(report: Report, variant: VariantReport, part: str) -> Metric | None:
    name = variant.parts.get(part)
    alone = next((each for each in report.variants if each.name == name), None)
    return None if alone is None else alone.metrics.get("kl_nats")


def _by_end(buckets: list[PositionBucket], ends: list[tuple[int, int]]) -> list[TableCell]:
    found = {(bucket.first, bucket.last): bucket.kl_nats for bucket in buckets}
    return [NOTHING if end not in found else kl_cell(found[end]) for end in ends]
