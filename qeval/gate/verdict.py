"""The nouns of a verdict: of a rule, of a variant, of the whole gate."""

from dataclasses import dataclass
from typing import Literal

from qeval.escape import terminal
from qeval.gate.metrics import Limit, Unit
from qeval.gate.policy import Rule
from qeval.report import notebook
from qeval.report.document import Table, TableCell

GateOutcome = Literal["pass", "fail", "inconclusive", "broken"]
EXIT_CODES: dict[GateOutcome, int] = {"pass": 0, "fail": 1, "broken": 3, "inconclusive": 4}
VERDICT_SCHEMA_VERSION = 1
_WORST_FIRST: tuple[GateOutcome, ...] = ("broken", "fail", "inconclusive")


@dataclass(frozen=True)
class RuleVerdict:
    """One rule on one variant. Figures are in the metric's own unit (shares, nats, factors, bytes), None where unknown.

    `low` and `high` are bounds held with `confidence` each; `more_rows` is how many more `rows` would decide an
    inconclusive rule, `repeats` how many scores an item would, and `smallest_effect` the distance from the margin that
    this run could have told.
    """

    rule: str  # "mmlu_acc_drop at most 1.0 points"
    metric: str
    title: str
    limit: Limit
    margin: float
    unit: Unit
    confidence: float
    outcome: GateOutcome
    counts_as: GateOutcome
    why: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    clusters: int | None = None
    rows: str = ""
    more_rows: int | None = None
    smallest_effect: float | None = None
    repeats: int | None = None
    floor: float | None = None


@dataclass(frozen=True)
class VariantVerdict:
    """All rules on one variant."""

    name: str
    outcome: GateOutcome
    rules: tuple[RuleVerdict, ...]
    error: str | None = None


@dataclass(frozen=True)
class GateVerdict:
    """The gate's answer, with the correction that it took in words."""

    run: str
    policy: str
    outcome: GateOutcome
    correction: str
    variants: tuple[VariantVerdict, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 broken, 4 inconclusive."""
        return EXIT_CODES[self.outcome]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return variant, rule, outcome and reason: a row a variant, and a row each of its rules."""
        rows: list[tuple[str, str, str, str]] = []
        for variant in self.variants:
            rows.append((variant.name, "", variant.outcome, variant.error or "all rules"))
            rows += [(variant.name, rule.rule, rule.outcome, rule.why) for rule in variant.rules]
        return rows

    def __str__(self) -> str:
        """Return the verdict in lines, the outcome of the whole first."""
        lines = ["  ".join(filter(None, row)) for row in self.rows()]
        return terminal("\n".join([f"{self.policy}: {self.outcome}", *lines, self.correction, *self.notes]))

    def _repr_html_(self) -> str:
        """Return the verdict as a table, for notebooks."""
        rows = tuple(tuple(TableCell(text) for text in row) for row in self.rows())
        table = notebook.table_markup(Table("Rules", ("Variant", "Rule", "Verdict", "Why"), rows))
        title = notebook.title_markup(f"{self.policy}: {self.outcome}")
        return str(title + table + notebook.paragraphs([self.correction, *self.notes]))


def of_rule(
    rule: Rule,
    confidence: float,
    outcome: GateOutcome,
    counts_as: GateOutcome,
    why: str,
    **figures: float | int | str | None,
) -> RuleVerdict:
    """Return a rule's verdict; `figures` are RuleVerdict's fields that have a default."""
    kind = rule.kind
    return RuleVerdict(
        rule.text, rule.metric, kind.title, kind.limit, rule.margin, kind.unit, confidence, outcome, counts_as, why,
        **figures,  # type: ignore[arg-type]
    )  # fmt: skip


def every(outcomes: list[GateOutcome]) -> GateOutcome:
    """Return the worst outcome; nothing at all is broken, never a pass.

    >>> every(["pass", "inconclusive"]), every([])
    ('inconclusive', 'broken')
    """
    if not outcomes:
        return "broken"
    return next((bad for bad in _WORST_FIRST if bad in outcomes), "pass")


def any_of(outcomes: list[GateOutcome]) -> GateOutcome:
    """Return a pass if one passes and none is broken; nothing at all is broken.

    >>> any_of(["pass", "fail"]), any_of(["inconclusive", "fail"]), any_of(["pass", "broken"])
    ('pass', 'inconclusive', 'broken')
    """
    order: tuple[GateOutcome, ...] = ("broken", "pass", "inconclusive", "fail")
    return next((outcome for outcome in order if outcome in outcomes), "broken")
