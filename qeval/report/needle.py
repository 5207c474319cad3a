"""The section on needles in haystacks: all together, and a map by depth and length."""

from qeval.report import formatting
from qeval.report.document import NOTHING, Section, Table, TableCell, metric_cell
from qeval.report.model import NeedleCell, Report
from qeval.report.tables import baseline_name

_COLUMNS = {
    "needle_recall": "Recall",
    "needle_log_p_nats": "log p of the answer, nats",
    "needle_rank": "Rank",
    "needle_recall_drop": "Drop of recall",
    "needle_loss_nats": "Loss of log p, nats",
}
_SIGNED = ("needle_recall_drop", "needle_loss_nats")
_NOTE = (
    "Recall: the share of answers that would be said greedily, token by token. Rank: of the answer's least likely "
    "token (1: the likeliest of all), the geometric mean. Drop and loss are paired with the baseline, needle by "
    "needle; above zero is worse. Intervals resample haystacks."
)
_MAP_NOTE = (
    "Of the baseline the log-probability of the answer, of each variant what it loses of that, paired; recall is "
    "beside each. Depth: 0 % is the start of the haystack. Cells of few haystacks have wide intervals."
)


def needle_section(report: Report) -> Section | None:
    """Return the section; None where no needle was asked for."""
    record = report.needle
    if record is None:
        return None
    lengths = formatting.listed([f"{length:,}" for length in record.lengths])
    sentence = (
        f"{record.haystacks} haystacks of {lengths} tokens each, with a needle at each of {len(record.depths)} depths "
        f"({'BOS starts each' if record.bos else 'no BOS'}); the answer is forced, not generated."
    )
    models = [(baseline_name(report), report.baseline.metrics)]
    models += [(variant.name, variant.metrics) for variant in report.variants]
    rows = tuple(
        (TableCell(name), *(metric_cell(metrics.get(each), signed=each in _SIGNED) for each in _COLUMNS))
        for name, metrics in models
    )
    table = Table("Needles in haystacks", ("Model", *_COLUMNS.values()), rows, _NOTE)
    return Section("needle", "Needles in haystacks", (sentence,), tables=(table, _map(report)))


def _map(report: Report) -> Table:
    """Return the losses by length and depth, models as columns."""
    columns = ("Tokens, depth", baseline_name(report), *(variant.name for variant in report.variants))
    rows = []
    for cell in report.baseline.needle:
        others = [_same_place(cell, variant.needle) for variant in report.variants]
        label = f"{cell.length:,}, {formatting.percent(cell.depth, 0)}"
        row = [
            TableCell(label),
            _cell(cell, "needle_log_p_nats"),
            *(_cell(each, "needle_loss_nats") for each in others),
        ]
        rows.append(tuple(row))
    return Table("Needles by length and depth", columns, tuple(rows), _MAP_NOTE)


def _same_place(cell: NeedleCell, cells: list[NeedleCell]) -> NeedleCell | None:
    return next((each for each in cells if (each.length, each.depth) == (cell.length, cell.depth)), None)


def _cell(cell: NeedleCell | None, name: str) -> TableCell:
    if cell is None:
        return NOTHING
    recall = f"recall {formatting.value_text(cell.metrics['needle_recall'])}"
    return metric_cell(cell.metrics[name], signed=name in _SIGNED, remark=recall)
