"""A diff as tables and sentences."""

from qeval.report import formatting
from qeval.report.diff.model import Diff, Difference, VariantDiff
from qeval.report.document import Table, TableCell
from qeval.report.model import Metric

_CHANGES = {
    "better": "B is better",
    "worse": "B is worse",
    "not resolved": "not resolved",
    "inconclusive": "inconclusive: no larger than the noise floor",
    "the same": "the same on every row",
}


def diff_tables(diff: Diff) -> list[Table]:
    """Return what changed in how the runs were made, then every variant's figures, then its answers."""
    tables = []
    if diff.changed:
        rows = tuple((TableCell(one.what), TableCell(one.a), TableCell(one.b)) for one in diff.changed)
        tables.append(Table("What is not the same", ("What", "A", "B"), rows))
    tables.append(_figures(diff.variants))
    if any(variant.answers for variant in diff.variants):
        tables.append(_answers(diff.variants))
    return tables


def sentences(diff: Diff) -> list[str]:
    """Return the finding on each variant in words."""
    return [_sentence(variant) for variant in diff.variants]


def _sentence(variant: VariantDiff) -> str:
    name = _name(variant)
    if all(one.verdict == "the same" for one in variant.differences):
        return f"{name}: no row differs."
    parts = [f"{one.title} {_by(one)}" for one in variant.differences if one.verdict in ("better", "worse")]
    open_ones = [one.title for one in variant.differences if one.verdict in ("not resolved", "inconclusive")]
    outcome = f"in B {formatting.listed(parts)}" if parts else "no difference is resolved"
    rest = f"; not settled: {formatting.listed(open_ones)}" if parts and open_ones else ""
    return f"{name}: {outcome}{rest}."


def _by(one: Difference) -> str:
    value = one.difference.value or 0.0
    size = one.difference.model_copy(update={"value": abs(value), "low": None, "high": None})
    unit = {"nats": " nats", "fraction": " points"}.get(one.difference.unit, "")
    amount = formatting.value_text(size).removesuffix(" %")
    return f"is {'higher' if value > 0 else 'lower'} by {amount}{unit} ({one.verdict})"


def _figures(variants: list[VariantDiff]) -> Table:
    rows = tuple(
        (
            TableCell(_name(variant)),
            TableCell(one.title),
            TableCell(_value(one, one.a)),
            TableCell(_value(one, one.b)),
            TableCell(
                formatting.value_text(one.difference, signed=True),
                formatting.interval_text(one.difference, signed=True),
            ),
            TableCell(formatting.MISSING if one.p_adjusted is None else f"{one.p_adjusted:.2g}"),
            TableCell(_CHANGES[one.verdict]),
        )
        for variant in variants
        for one in variant.differences
    )
    columns = ("Variant", "Figure", "A", "B", "Difference", "p, adjusted", "Finding")
    note = (
        "Differences are B minus A, row by row, each with its own 95 % t interval clustered by window or subject. The "
        f"finding rests on p after Holm over all {len(rows)}, since some of many intervals leave zero out by chance."
    )
    return Table("B against A, paired", columns, rows, note)


def _answers(variants: list[VariantDiff]) -> Table:
    rows = tuple(
        (
            TableCell(_name(variant)),
            TableCell(one.title, remark="baseline at chance" if one.baseline_at_chance else None),
            TableCell(str(one.right_to_wrong)),
            TableCell(str(one.wrong_to_right)),
            TableCell(str(one.wrong_to_other)),
            TableCell(str(one.questions)),
            TableCell(f"{one.p_value:.2g}"),
            TableCell(f"{one.p_adjusted:.2g}"),
        )
        for variant in variants
        for one in variant.answers
    )
    columns = (
        "Variant", "Task", "Right in A, wrong in B", "Wrong in A, right in B", "Another wrong answer", "Questions",
        "p, McNemar", "p, adjusted",
    )  # fmt: skip
    note = f"p: McNemar's exact test on the flips; adjusted after Holm over the {len(rows)} tests of this table."
    return Table("Answers of B against A", columns, rows, note)


def _value(one: Difference, value: float) -> str:
    metric = Metric(value=value, low=None, high=None, unit=one.difference.unit, better="neither", n=0, clusters=0)
    return formatting.value_text(metric)


def _name(variant: VariantDiff) -> str:
    return variant.a if variant.a == variant.b else f"{variant.b} against {variant.a}"
