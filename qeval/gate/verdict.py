"""The nouns of a verdict: of a rule, of a variant, of the whole gate."""

from dataclasses import dataclass
from typing import Literal

from qeval.gate.kinds import Limit, Unit
from qeval.gate.policy import Rule

Outcome = Literal["pass", "fail", "inconclusive", "broken"]
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 1, "broken": 3, "inconclusive": 4}
SCHEMA_VERSION = 1
_WORST_FIRST: tuple[Outcome, ...] = ("broken", "fail", "inconclusive")


@dataclass(frozen=True)
class RuleVerdict:
    """One rule on one variant. Figures are in the metric's own unit (shares, nats, factors, bytes), None where unknown.

    `low` and `high` are bounds held with `confidence` each; `more_rows` is how many more `rows` would decide an
    inconclusive rule, `smallest_effect` the distance from the margin that this run could have told.
    """

    rule: str  # "mmlu_acc_drop at most 1.0 points"
    metric: str
    title: str
    limit: Limit
    margin: float
    unit: Unit
    confidence: float
    outcome: Outcome
    counts_as: Outcome
    why: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    clusters: int | None = None
    rows: str = ""
    more_rows: int | None = None
    smallest_effect: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class VariantVerdict:
    """All rules on one variant."""

    name: str
    outcome: Outcome
    rules: tuple[RuleVerdict, ...]
    error: str | None = None


@dataclass(frozen=True)
class GateVerdict:
    """The gate's answer, with the correction that it took in words."""

    run: str
    policy: str
    outcome: Outcome
    correction: str
    variants: tuple[VariantVerdict, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 broken, 4 inconclusive."""
        return EXIT_CODES[self.outcome]


def of_rule(
    rule: Rule, confidence: float, outcome: Outcome, counts_as: Outcome, why: str, **figures: float | int | str | None
) -> RuleVerdict:
    """A rule's verdict; `figures` are RuleVerdict's fields that have a default."""
    kind = rule.kind
    return RuleVerdict(
        rule.text, rule.metric, kind.title, kind.limit, rule.margin, kind.unit, confidence, outcome, counts_as, why,
        **figures,  # type: ignore[arg-type]
    )  # fmt: skip


def every(outcomes: list[Outcome]) -> Outcome:
    """The worst; nothing at all is broken, never a pass.

    >>> every(["pass", "inconclusive"]), every([])
    ('inconclusive', 'broken')
    """
    if not outcomes:
        return "broken"
    return next((bad for bad in _WORST_FIRST if bad in outcomes), "pass")


def any_of(outcomes: list[Outcome]) -> Outcome:
    """A pass if one passes and none is broken; nothing at all is broken.

    >>> any_of(["pass", "fail"]), any_of(["inconclusive", "fail"]), any_of(["pass", "broken"])
    ('pass', 'inconclusive', 'broken')
    """
    order: tuple[Outcome, ...] = ("broken", "pass", "inconclusive", "fail")
    return next((outcome for outcome in order if outcome in outcomes), "broken")
