"""The table of what calibration showed the experts of each variant."""

from collections.abc import Sequence
from statistics import median

from qeval.report.document import Table, TableCell
from qeval.report.formatting import listed
from qeval.report.model import Report

_FOLD_FROM = 12


def experts_tables(report: Report) -> tuple[Table, ...]:
    """Return the table of the calibration tokens that reached each layer's experts; none where no variant saw any."""
    alike: dict[str, list[str]] = {}
    seen = {variant.name: variant.expert_tokens for variant in report.variants if variant.expert_tokens}
    for name, stacks in seen.items():
        alike.setdefault(repr(stacks), []).append(name)
    rows = [
        (TableCell(listed(names)), TableCell(stack), *_counts(tokens))
        for names in alike.values()
        for stack, tokens in seen[names[0]].items()
    ]
    if not rows:
        return ()
    columns = ("Variant", "Experts", "Number", "Fewest tokens", "Median", "Most", "Seen by none")
    note = "Calibration tokens that were routed to an expert: what its inner matrix was rounded by."
    caption = "Experts' calibration tokens"
    return (Table(caption, columns, tuple(rows), note, folded=len(rows) >= _FOLD_FROM),)


def _counts(tokens: Sequence[int]) -> tuple[TableCell, ...]:
    figures = (len(tokens), min(tokens), median(tokens), max(tokens), sum(count == 0 for count in tokens))
    return tuple(TableCell(f"{figure:,.0f}") for figure in figures)
