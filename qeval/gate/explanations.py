"""Verdicts in words: what was measured, what it may at most be, and what that means for the margin."""

from qeval.gate.figure import Figure
from qeval.gate.metrics import SCALE, MetricKind
from qeval.gate.policy import Rule
from qeval.gate.verdict import GateOutcome
from qeval.report.formatting import decimals_for, listed, number
from qeval.stats.bootstrap import Interval

ROUGH_CLUSTERS = 30
"""Bounds from fewer clusters are rough: benchmarks/coverage.py shows how much."""

_MOST_DECIMALS = 6


def reason(rule: Rule, figure: Figure, bound: Interval, confidence: float, outcome: GateOutcome) -> str:
    """Return one sentence, such as 'drop of 0.8 points, at most 1.7 with 95 % confidence: over 1.0'."""
    kind, scale, limit = rule.kind, SCALE[rule.kind.unit], rule.margin_text.split()[0]
    end, word = _end(kind, bound, outcome)
    decimals = _decimals(figure.value / scale, end if end is None else end / scale, rule.margin / scale)
    value = number(figure.value / scale, decimals)
    effect = f"{value} times smaller" if kind.unit == "times" else f"{kind.title} of {value} {kind.unit}"
    if figure.bounded is None:
        return f"{effect}: {_side(kind, figure.value, rule.margin)} {limit}"
    if end is None:
        return f"{effect}; {_unbounded(figure)}"
    return (
        f"{effect}, {word} {number(end / scale, decimals)} with {100 * confidence:.4g} % confidence: "
        f"{_side(kind, end, rule.margin)} {limit}"
    )


def sequential(rule: Rule, figure: Figure, confidence: float, outcome: GateOutcome, seen: str) -> str:
    """Return a sentence on a rule of a run that may stop early: the figure after `seen`, and what is certain."""
    kind, scale, limit = rule.kind, SCALE[rule.kind.unit], rule.margin_text.split()[0]
    value = number(figure.value / scale, _decimals(figure.value / scale, None, rule.margin / scale))
    effect = f"{kind.title} of {value} {kind.unit} after {seen}"
    if outcome == "inconclusive":
        return f"{effect}: neither side of {limit} is certain with {100 * confidence:.4g} % confidence"
    side = (
        _side(kind, rule.margin, rule.margin) if outcome == "pass" else "over" if kind.limit == "at_most" else "under"
    )
    return f"{effect}, {side} {limit} with {100 * confidence:.4g} % confidence whenever one stops"


def advice(
    kind: MetricKind, figure: Figure, more: int | None, smallest: float | None, repeats: int | None = None
) -> str:
    """Return what would decide an inconclusive rule, and what this run could have seen."""
    parts = []
    if more is not None:
        parts.append(f"about {more:,} more {figure.rows} would decide it, if the figure stays")
    elif figure.bounded is not None and figure.bounded.mean.clusters >= 2:
        parts.append(f"it lies so near the margin that no number of {figure.rows} would decide it soon")
    if repeats is not None:
        parts.append(f"so would about {repeats:,} repeats an item")
    if smallest is not None:
        shown = smallest / SCALE[kind.unit]
        parts.append(
            f"the smallest effect that this run could have seen is "
            f"{number(shown, decimals_for(shown, None, None, 2))} {kind.unit}"
        )
    return "; ".join(parts)


def rough(figure: Figure) -> str | None:
    """Return a remark on a bound that rests on few clusters."""
    if figure.bounded is None or not 2 <= figure.bounded.mean.clusters < ROUGH_CLUSTERS:
        return None
    return f"a rough bound, from {figure.bounded.mean.clusters} {figure.clusters}"


def under_floor(kind: MetricKind, floor: float) -> str:
    """Return a remark on an effect that the baseline shows against itself."""
    shown = floor / SCALE[kind.unit]
    return (
        f"no larger than the noise floor of {number(shown, decimals_for(shown, None, None, 2))} {kind.unit}, by which "
        "the baseline differs from itself in another type or backend"
    )


def correction(require: str, gated: int) -> str:
    """Return which correction for several looks was taken, and why."""
    if require == "any" and gated > 1:
        return (
            f"One of {gated} variants is enough, so each is judged at a confidence corrected by Holm's step-down "
            "method; within a variant every rule must pass (an intersection-union test), which needs no correction."
        )
    return (
        "Every rule must pass, each at its own confidence: an intersection-union test, which needs no correction "
        "for several rules."
    )


def unmatched(names: list[str]) -> str:
    """Return rules that are about none of the gated variants."""
    return f"About none of the gated variants: {listed(names)}."


def _end(kind: MetricKind, bound: Interval, outcome: GateOutcome) -> tuple[float | None, str]:
    """Return the bound that decides: the far one for a pass or a doubt, the near one for a fail."""
    upper = (kind.limit == "at_most") == (outcome != "fail")
    return (bound.high, "at most") if upper else (bound.low, "at least")


def _side(kind: MetricKind, value: float, margin: float) -> str:
    if kind.limit == "at_most":
        return "within" if value <= margin else "over"
    return "not under" if value >= margin else "under"


def _unbounded(figure: Figure) -> str:
    assert figure.bounded is not None
    mean = figure.bounded.mean
    if mean.clusters < 2:
        return f"no bound from a single one of the {figure.clusters}"
    return f"no bound from {mean.n:,} {figure.rows}: too few lie that far out"


def _decimals(value: float, end: float | None, margin: float) -> int:
    """Return digits that the bound supports, and as many as tell it and the value from the margin."""
    reach = None if end is None else abs(end - value)
    decimals = decimals_for(
        value, None if reach is None else value - reach, None if reach is None else value + reach, 2
    )
    while decimals < _MOST_DECIMALS and _hidden((value, end), margin, decimals):
        decimals += 1
    return decimals


def _hidden(ends: tuple[float | None, ...], margin: float, decimals: int) -> bool:
    """Return whether rounding would make one of them look like the margin."""
    return any(end is not None and end != margin and round(end, decimals) == margin for end in ends)
