"""The ranking: one row a variant, its other backends folded into it as what their kernels add."""

from qeval.report.build import quality
from qeval.report.document import NOTHING, Table, TableCell
from qeval.report.floors import largest_floor
from qeval.report.formatting import metric_text
from qeval.report.loss_breakdown import kl_cell
from qeval.report.model import Report, VariantReport
from qeval.report.tables import overview_table

_FIRST = ("Variant", "KL, nats", "Size", "Bits/weight")
"""The columns that a narrow screen shows."""


def ranking(report: Report, recommended: str | None) -> Table:
    """Return the variants by their loss, below the baseline; those without a rank come last, with the reason.

    Args:
        report: The report; its overview holds the cells.
        recommended: The name of the variant to mark as recommended.
    """
    table = overview_table(report)
    baseline, *cells = table.rows
    by_name = {variant.name: row for variant, row in zip(report.variants, cells, strict=True)}
    variants = [v for v in report.variants if v.role == "variant" and v.twin not in by_name]

    # the same weights on other backends: what the kernel alone adds, by backend and name
    others = [v for v in report.variants if v.twin in by_name and "kernel_kl_nats" in v.metrics]
    kernels = {(v.backend, v.twin): v for v in others}
    backends = list(dict.fromkeys(v.backend for v in others))

    rows = [(*baseline, *[NOTHING] * len(backends))]
    for variant in sorted(variants, key=_rank):
        name, *measured = by_name[variant.name]
        if variant.name == recommended:
            name = name._replace(remark="recommended")
        rows.append((name, *measured, *(_kernel_cell(kernels.get((b, variant.name))) for b in backends)))
    columns = (*table.columns, *(f"Kernel, {backend}, nats" for backend in backends))

    first = [columns.index(name) for name in _FIRST if name in columns]
    order = [*first, *(place for place in range(len(columns)) if place not in first)]
    ordered = [tuple(row[place] for place in order) for row in rows]
    names = tuple(columns[place] for place in order)
    return Table("Variants by what they lost", names, tuple(ordered), _note(report, bool(backends)))


def _rank(variant: VariantReport) -> float:
    loss = quality(variant)
    return float("inf") if loss is None else loss


def _kernel_cell(variant: VariantReport | None) -> TableCell:
    return NOTHING if variant is None else kl_cell(variant.metrics["kernel_kl_nats"])


def _note(report: Report, kernels: bool) -> str | None:
    floor = largest_floor(report.variants)
    parts = [f"Noise floor ({floor[0].name}): KL {metric_text(floor[1])} nats."] if floor else []
    parts += ["Kernel: KL of that backend's answers from those of the same weights in torch."] if kernels else []
    return " ".join(parts) or None
