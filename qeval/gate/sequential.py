"""Looking at a run that is not over: which rules the rows drawn so far decide, valid however often one looks.

Rows are drawn in a random order, questions one by one and windows one by one; a window is a cluster of tokens that is
judged as one. What is claimed holds for texts and questions like those that the run draws from. Greedy continuations
are all run before the first look, so their rules are judged there, once and for all, as those of a finished run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log1p

import numpy as np

from qeval.errors import QevalError
from qeval.gate import explanations
from qeval.gate.bounded_metrics import Figures, column_of
from qeval.gate.figure import Figure
from qeval.gate.judge import counts_as, decide
from qeval.gate.metrics import ANSWERS, QUANTILES, split
from qeval.gate.policy import Policy, Rule
from qeval.gate.verdict import GateOutcome, RuleVerdict, of_rule
from qeval.report import measure_items
from qeval.report.align import ItemRows
from qeval.report.run_rows import PairedRun
from qeval.stats.bootstrap import Clusters, Floats, Interval, NonFiniteError
from qeval.stats.sequential import Decision, decide_bounded, decide_sums
from qeval.store.run import TaskRecord, VariantRecord

GROUP = 20
"""Questions whose KL over the choices is judged as one sum."""

Key = tuple[str, int]
"""A question: its subject, and its index there."""


@dataclass(frozen=True)
class Drawn:
    """The sample drawn so far, in that order, out of a known total.

    `stretches`: windows that overlap are drawn together, and judged as one; the number that each is of. Without it
    each window is one. No window and no question repeats another.
    """

    windows: tuple[int, ...]
    windows_in_all: int
    questions: Mapping[str, tuple[Key, ...]]
    questions_in_all: Mapping[str, int]
    stretches: Mapping[int, int] = field(default_factory=dict)

    def stretch(self, window: int) -> int:
        """Return the stretch of text that a window is of."""
        return self.stretches.get(window, window)

    @property
    def stretches_drawn(self) -> list[int]:
        """The stretches as they were drawn."""
        return list(dict.fromkeys(self.stretch(window) for window in self.windows))

    @property
    def stretches_in_all(self) -> int:
        """The number of stretches."""
        return len(set(self.stretches.values())) or self.windows_in_all


def look(run: PairedRun, variant: VariantRecord, policy: Policy, drawn: Drawn) -> tuple[RuleVerdict, ...]:
    """Judge every rule about the variant by the rows so far; inconclusive while undecided."""
    figures = Figures(run, variant)
    rules = [rule for rule in policy.rules if rule.holds_for(variant.name)]
    return tuple(_looked(rule, figures, run, variant, policy, drawn) for rule in rules)


def _looked(
    rule: Rule, figures: Figures, run: PairedRun, variant: VariantRecord, policy: Policy, drawn: Drawn
) -> RuleVerdict:
    confidence = policy.confidence_of(rule)
    try:
        figure = figures.of(rule.metric)
        if figure.bounded is None or rule.kind.source in ("drift", "needle"):
            return _at_once(rule, figure, confidence, policy)
        decision = _decision(rule, run, variant, drawn, 1 - confidence)
    except QevalError as error:
        return of_rule(rule, confidence, "broken", "broken", str(error))
    except NonFiniteError as error:
        return of_rule(rule, confidence, "broken", "broken", f"{rule.metric} cannot be told: {error}")

    outcome: GateOutcome = "inconclusive"
    if decision and not figure.at_chance:
        outcome = "pass" if (decision.side == "below") == (rule.kind.limit == "at_most") else "fail"
    done, total, what = _progress(rule, drawn)
    why = explanations.sequential(rule, figure, confidence, outcome, f"{done:,} of {total:,} {what}")
    return of_rule(
        rule, confidence, outcome, counts_as(policy, rule, outcome, chance=bool(figure.at_chance)),
        ". ".join(filter(None, [why, figure.at_chance])), value=figure.value, n=figure.bounded.mean.n,
        clusters=figure.bounded.mean.clusters, rows=figure.rows,
    )  # fmt: skip


def _at_once(rule: Rule, figure: Figure, confidence: float, policy: Policy) -> RuleVerdict:
    """Judge a rule on what more rows will not change: a size, or what all prompts were run for already."""
    bound = figure.bounded.bounds(confidence) if figure.bounded else Interval(figure.value, figure.value)
    outcome = decide(rule.kind, figure, bound, rule.margin)
    return of_rule(
        rule, confidence, outcome, counts_as(policy, rule, outcome, chance=False),
        explanations.reason(rule, figure, bound, confidence, outcome),
        value=figure.value, low=bound.low, high=bound.high, rows=figure.rows,
        n=figure.bounded.mean.n if figure.bounded else None,
        clusters=figure.bounded.mean.clusters if figure.bounded else None,
    )  # fmt: skip


def _progress(rule: Rule, drawn: Drawn) -> tuple[int, int, str]:
    task, _ = split(rule.metric)
    if task is None:
        return len(drawn.windows), drawn.windows_in_all, "windows"
    return len(drawn.questions[task]), drawn.questions_in_all[task], "questions"


def _decision(rule: Rule, run: PairedRun, variant: VariantRecord, drawn: Drawn, alpha: float) -> Decision | None:
    task, name = split(rule.metric)
    if task is None:
        excess, least = _token_excess(run, variant, name, rule.margin, drawn)
        return decide_sums(excess, alpha, drawn.stretches_in_all, least_variance=least)
    record = next(record for record in run.record.tasks if record.name == task)
    values = _answer_values(run, variant, record, name)[_order(run.baseline_items(record), drawn.questions[task])]
    if name == "choice_kl_nats":
        groups = values.size // GROUP
        sums = (values[: groups * GROUP] - rule.margin).reshape(groups, GROUP).sum(axis=1)
        return decide_sums(sums, alpha, drawn.questions_in_all[task] // GROUP)
    low = -1.0 if name == "acc_drop" else 0.0
    if not low < rule.margin < 1:
        return None  # a margin at the end of what can be: nothing to bet on
    return decide_bounded(values, rule.margin, alpha, low=low)


def _token_excess(
    run: PairedRun, variant: VariantRecord, name: str, margin: float, drawn: Drawn
) -> tuple[Floats, float]:
    """Return each drawn window's sum of (value - margin), and the least variance to take a sum for."""
    if name.startswith(ANSWERS) and run.protocol and run.protocol.parts:
        raise QevalError(
            f"{name} is of some of the windows that are drawn, and a gate that may stop early takes all alike; gate a "
            "finished run, or draw from --corpus chat alone."
        )
    name = name.removeprefix(ANSWERS)
    rows, column = run.tokens(variant), column_of(name)
    values, limit = rows.of(column), margin
    if name in QUANTILES:
        values, limit = (values > margin).astype(np.float64), 1 - QUANTILES[name]
    elif column == "nll":
        values = values - run.baseline_tokens.of("nll")
        limit = log1p(margin) if name == "ppl_increase" else margin

    # sums by stretch of text, in the order of their drawing
    windows = rows.by_window(column)
    numbers = np.unique(rows.windows[rows.scored[column]]).tolist()
    of_window = [drawn.stretch(number) for number in numbers]
    clusters = Clusters(np.unique(of_window, return_inverse=True)[1].astype(np.int64)[windows.ids], len(set(of_window)))
    sums = clusters.sums(values - limit)
    place = {stretch: i for i, stretch in enumerate(sorted(set(of_window)))}

    shares = name in QUANTILES or name == "top1_agreement"
    least = float(limit * (1 - limit) * clusters.sizes().mean()) if shares else 0.0
    return sums[[place[stretch] for stretch in drawn.stretches_drawn]], least


def _answer_values(run: PairedRun, variant: VariantRecord, record: TaskRecord, name: str) -> Floats:
    rows, baseline = run.items(record, variant), run.baseline_items(record)
    if name == "choice_kl_nats":
        return measure_items.choice_kl_nats(rows, baseline)
    if name == "acc_drop":
        return baseline.acc - rows.acc
    went = measure_items.transitions(rows, baseline)
    return (went["right_to_wrong"] | (went["wrong_to_right"] & (name == "flips"))).astype(np.float64)


def _order(rows: ItemRows, drawn: tuple[Key, ...]) -> list[int]:
    """Return where the drawn questions stand in the rows."""
    place = {
        (str(subject), int(item)): i for i, (subject, item) in enumerate(zip(rows.subjects, rows.items, strict=True))
    }
    return [place[key] for key in drawn]
