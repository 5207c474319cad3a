"""A diff as tables and sentences."""

from qeval.diff.model import Diff, Difference, VariantDiff
from qeval.report import words
from qeval.report.model import Metric
from qeval.report.page import Cell, Table

_SAID = {
    "better": "B is better",
    "worse": "B is worse",
    "not resolved": "not resolved",
    "inconclusive": "inconclusive: no larger than the noise floor",
    "the same": "the same on every row",
}


def diff_tables(diff: Diff) -> list[Table]:
    """What changed in how the runs were made, then every variant's figures, then its answers."""
    found = []
    if diff.changed:
        rows = tuple((Cell(one.what), Cell(one.a), Cell(one.b)) for one in diff.changed)
        found.append(Table("What is not the same", ("What", "A", "B"), rows))
    found.append(_figures(diff.variants))
    if any(variant.answers for variant in diff.variants):
        found.append(_answers(diff.variants))
    return found


def sentences(diff: Diff) -> list[str]:
    """The finding on each variant in words."""
    return [_sentence(variant) for variant in diff.variants]


def _sentence(variant: VariantDiff) -> str:
    name = _name(variant)
    if all(one.verdict == "the same" for one in variant.differences):
        return f"{name}: no row differs."
    parts = [f"{one.title} {_by(one)}" for one in variant.differences if one.verdict in ("better", "worse")]
    open_ones = [one.title for one in variant.differences if one.verdict in ("not resolved", "inconclusive")]
    told = f"in B {words.listed(parts)}" if parts else "no difference is resolved"
    rest = f"; not settled: {words.listed(open_ones)}" if parts and open_ones else ""
    return f"{name}: {told}{rest}."


def _by(one: Difference) -> str:
    value = one.difference.value or 0.0
    size = one.difference.model_copy(update={"value": abs(value), "low": None, "high": None})
    unit = {"nats": " nats", "fraction": " points"}[one.difference.unit]
    amount = words.value_text(size).removesuffix(" %")
    return f"is {'higher' if value > 0 else 'lower'} by {amount}{unit} ({one.verdict})"


def _figures(variants: list[VariantDiff]) -> Table:
    rows = tuple(
        (
            Cell(_name(variant)),
            Cell(one.title),
            Cell(_value(one, one.a)),
            Cell(_value(one, one.b)),
            Cell(words.value_text(one.difference, signed=True), words.interval_text(one.difference, signed=True)),
            Cell(words.MISSING if one.p_adjusted is None else f"{one.p_adjusted:.2g}"),
            Cell(_SAID[one.verdict]),
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
            Cell(_name(variant)),
            Cell(one.title, remark="baseline at chance" if one.baseline_at_chance else None),
            Cell(str(one.right_to_wrong)),
            Cell(str(one.wrong_to_right)),
            Cell(str(one.wrong_to_other)),
            Cell(str(one.questions)),
            Cell(f"{one.p_value:.2g}"),
            Cell(f"{one.p_adjusted:.2g}"),
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
    return words.value_text(metric)


def _name(variant: VariantDiff) -> str:
    return variant.a if variant.a == variant.b else f"{variant.b} against {variant.a}"
