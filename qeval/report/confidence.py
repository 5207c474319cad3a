"""Tables of where the loss lies by how sure the baseline was; a row a variant and bucket."""

from collections.abc import Iterator

from qeval.report import formatting
from qeval.report.document import NOTHING, Table, TableCell, metric_cell
from qeval.report.model import EntropyBucket, MarginBucket, Report, Task

_SURENESS = ("Surest fifth", "Second", "Third", "Fourth", "Least sure fifth")


def by_entropy(report: Report) -> Iterator[Table]:
    """Yield KL by fifth of the positions, where some variant has it."""
    rows = [
        _entropy_row(v.name, place, bucket) for v in report.variants for place, bucket in enumerate(v.kl_by_entropy)
    ]
    if not rows:
        return
    columns = ("Variant", "Positions", "Baseline's entropy, nats", "KL mean, nats", "Share of all KL", "Same top token")
    note = (
        "Positions by the entropy of the baseline's own distribution: a loss where it was sure changes what is "
        "written, one where it was not may change little."
    )
    yield Table("KL by how sure the baseline was", columns, tuple(rows), note)


def by_margin(report: Report, task: Task) -> Iterator[Table]:
    """Yield flips by the baseline's margin between its first two choices, where some variant has them."""
    rows = [
        _margin_row(v.name, bucket)
        for v in report.variants
        if task.record.name in v.tasks
        for bucket in v.tasks[task.record.name].flips_by_margin
    ]
    if not rows:
        return
    columns = (
        "Variant", "Margin", "Questions", "Flips", "Right → wrong", "Wrong → right",
        "Wrong → another wrong",
    )  # fmt: skip
    note = "The margin is the baseline's probability of its first choice above that of its second, over the choices."
    yield Table(f"{task.record.title}: flips by the baseline's margin", columns, tuple(rows), note)


def _entropy_row(name: str, place: int, bucket: EntropyBucket) -> tuple[TableCell, ...]:
    label = _SURENESS[place] if place < len(_SURENESS) else str(place + 1)
    return (
        TableCell(name),
        TableCell(f"{label} ({bucket.positions:,})"),
        TableCell(f"{formatting.number(bucket.low_nats, 2)} to {formatting.number(bucket.high_nats, 2)}"),
        metric_cell(bucket.kl_nats),
        NOTHING if bucket.kl_share is None else TableCell(formatting.percent(bucket.kl_share)),
        metric_cell(bucket.top1_agreement),
    )


def _margin_row(name: str, bucket: MarginBucket) -> tuple[TableCell, ...]:
    return (
        TableCell(name),
        TableCell(f"{bucket.low:g} to {bucket.high:g}"),
        TableCell(str(bucket.questions)),
        metric_cell(bucket.flips),
        TableCell(str(bucket.right_to_wrong)),
        TableCell(str(bucket.wrong_to_right)),
        TableCell(str(bucket.wrong_to_other)),
    )
