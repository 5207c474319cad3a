"""`judge` a finished run by a policy: each rule by the bound of its interval, never by the mean."""

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from qeval.errors import BrokenRecordError, QevalError, UsageError, unknown
from qeval.gate import explanations
from qeval.gate.bounded_metrics import Figures
from qeval.gate.figure import Figure
from qeval.gate.metrics import MetricKind
from qeval.gate.policy import Policy, Rule
from qeval.gate.verdict import GateOutcome, GateVerdict, RuleVerdict, VariantVerdict, any_of, every, of_rule
from qeval.report.contamination import void
from qeval.report.referenced_run import ReferencedRun
from qeval.report.run_rows import PairedRun
from qeval.report.soundness import impossible_baseline, not_quantized, remarks
from qeval.stats.bootstrap import Interval, NonFiniteError
from qeval.stats.bounds import factor_to_decide, smallest_effect
from qeval.stats.repeats import BoundedScore, repeats_to_decide
from qeval.store.run import VariantRecord


def judge(folder: Path, policy: Policy, names: Sequence[str] = (), against: Path | None = None) -> GateVerdict:
    """Judge the variants named, or all; the noise floor is never gated.

    Args:
        folder: The run's folder.
        policy: The rules.
        names: The variants; none: all.
        against: The folder of an earlier run: each variant is held against itself there in the baseline's place.

    Raises:
        UsageError: `folder` holds no run, or none of a name.
        BrokenRecordError: its record is torn or of another version, vouches for nothing, or is not of what lies beside
            it; or a command began to write into the folder and did not finish.
        QevalError: the run has no variant, or a baseline that can be no model.
    """
    run = PairedRun(folder)
    if run.missing_chain:
        raise BrokenRecordError(run.missing_chain)
    records = _gated(run, names)

    floors = [_Floor(run, record) for record in run.done if record.role == "floor"]
    earlier = None if against is None else PairedRun(against)
    compared = {
        record.name: run if earlier is None else ReferencedRun(folder, earlier, record.name) for record in records
    }
    judges = {record.name: _Judge(run, compared[record.name], record, policy, floors) for record in records}
    verdicts = _stepwise(judges) if policy.needs_one else [each.verdict(1) for each in judges.values()]

    outcomes = [verdict.outcome for verdict in verdicts]
    return GateVerdict(
        run=str(folder),
        policy=policy.name,
        outcome=any_of(outcomes) if policy.needs_one else every(outcomes),
        correction=explanations.correction("any" if policy.needs_one else "every", len(records)),
        variants=tuple(verdicts),
        notes=(*_notes(policy, records), *_lost_floors(run), *run_notes(run), *_reference_note(earlier)),
    )


def broken_verdict(folder: Path, policy: Policy, error: str) -> GateVerdict:
    """Return the verdict on a run of which nothing can be judged."""
    variant = VariantVerdict("the run", "broken", (), error)
    return GateVerdict(str(folder), policy.name, "broken", "Nothing was judged.", (variant,), ())


def run_notes(run: PairedRun) -> list[str]:
    """Return what a reader of a verdict must know of the run: what repeats, and which variants are not quantized.

    A run whose rows can't be read says nothing here: its rules are broken.
    """
    try:
        return [*run.repeat_notes, *remarks(run)]
    except (QevalError, NonFiniteError):
        return []


def variant_verdict(
    policy: Policy, run: PairedRun, record: VariantRecord, rules: Sequence[RuleVerdict]
) -> VariantVerdict:
    """Return a variant's verdict from those of its rules, and from what else the policy requires of it."""
    outcome = every([rule.counts_as for rule in rules])
    if outcome != "broken" and policy.needs_quantized and (reason := not_quantized(run, record)):
        return VariantVerdict(record.name, "fail", tuple(rules), f"{reason} The policy requires: quantized.")
    is_unknown = policy.needs_quantized and record.quantized_weights is None
    if outcome == "pass" and is_unknown and policy.when_inconclusive != "pass":
        reason = "The run was imported, so whether anything in it is quantized is not known."
        return VariantVerdict(
            record.name, policy.when_inconclusive, tuple(rules), f"{reason} The policy requires: quantized."
        )
    return VariantVerdict(record.name, outcome, tuple(rules))


def decide(kind: MetricKind, figure: Figure, bound: Interval, margin: float) -> GateOutcome:
    """Return pass or fail where the whole of the bound lies on one side of the margin, else inconclusive."""
    low, high = (figure.value, figure.value) if figure.bounded is None else bound
    if kind.limit == "at_most":
        return "pass" if high is not None and high <= margin else "fail" if low is not None and low > margin else _OPEN
    return "pass" if low is not None and low >= margin else "fail" if high is not None and high < margin else _OPEN


def counts_as(policy: Policy, rule: Rule, outcome: GateOutcome, *, chance: bool) -> GateOutcome:
    """Return how the policy takes an outcome: only an inconclusive one may count as another."""
    if outcome != "inconclusive":
        return outcome
    usual = rule.when_inconclusive or policy.when_inconclusive
    return (rule.when_at_chance or usual) if chance else usual


_OPEN: GateOutcome = "inconclusive"


class _Doubt(NamedTuple):
    """The evidence that would decide an inconclusive rule, and what the run could have seen."""

    more_rows: int | None
    smallest_effect: float | None
    repeats: int | None = None


_NO_DOUBT = _Doubt(None, None)


class _Floor:
    """The baseline against itself in another type or backend: effects up to its own are no effects."""

    def __init__(self, run: PairedRun, record: VariantRecord) -> None:
        self.backend = record.backend
        figures = Figures(run, record)
        self.effect = cache(lambda metric: figures.of(metric).effect)


class _Judge:
    """One variant under a policy; its figures are read once, whatever the number of levels tried."""

    def __init__(
        self, run: PairedRun, compared: PairedRun, record: VariantRecord, policy: Policy, floors: list[_Floor]
    ) -> None:
        self._paired, self._run, self._record, self._policy = run, run.record, record, policy
        self._figure = cache(Figures(compared, record).of)
        same_backend = [floor for floor in floors if floor.backend == record.backend]
        self._floors = same_backend or floors

    def verdict(self, among: int) -> VariantVerdict:
        """Judge every rule about the variant, at a confidence that is corrected for `among` variants."""
        name = self._record.name
        if self._record.status != "done":
            return VariantVerdict(name, "broken", (), f"'{name}' failed in this run: {self._record.error}")
        if why := self._impossible or void(self._run, self._record):
            return VariantVerdict(name, "broken", (), why)
        rules = tuple(self._rule(rule, among) for rule in self._policy.rules if rule.holds_for(name))
        if not rules:
            return VariantVerdict(name, "broken", (), f"No rule of the policy is about '{name}': nothing was checked.")
        return variant_verdict(self._policy, self._paired, self._record, rules)

    @cached_property
    def _impossible(self) -> str | None:
        """The reason why the baseline can be no model; where its rows can't be read, the rules say so."""
        try:
            return impossible_baseline(self._paired)
        except BrokenRecordError:
            return None

    def _rule(self, rule: Rule, among: int) -> RuleVerdict:
        confidence = 1 - (1 - self._policy.confidence_of(rule)) / among
        try:
            figure = self._figure(rule.metric)
            floor = self._floor(rule.metric, figure)
        except QevalError as error:
            return of_rule(rule, confidence, "broken", "broken", str(error))

        # what the bound says
        bound = figure.bounded.bounds(confidence) if figure.bounded else Interval(figure.value, figure.value)
        outcome = decide(rule.kind, figure, bound, rule.margin)
        why = [explanations.reason(rule, figure, bound, confidence, outcome), *filter(None, [figure.detail])]

        # an effect below the noise floor decides nothing, nor does accuracy at chance
        lost = floor is not None and figure.effect <= floor
        doubt = _NO_DOUBT
        if figure.at_chance or (lost and (outcome == "fail" or rule.margin < 0)):
            outcome = "inconclusive"
        elif outcome == "inconclusive":
            doubt = _doubt(figure, rule.margin, confidence)
            why.append(explanations.advice(rule.kind, figure, doubt.more_rows, doubt.smallest_effect, doubt.repeats))

        why += [explanations.under_floor(rule.kind, floor)] if floor is not None and lost else []
        why += [remark] if (remark := explanations.rough(figure)) else []
        return of_rule(
            rule, confidence, outcome, counts_as(self._policy, rule, outcome, chance=bool(figure.at_chance)),
            ". ".join(filter(None, ["; ".join(filter(None, why)), figure.at_chance])),
            value=figure.value, low=bound.low, high=bound.high, rows=figure.rows, floor=floor,
            n=figure.bounded.mean.n if figure.bounded else None,
            clusters=figure.bounded.mean.clusters if figure.bounded else None,
            more_rows=doubt.more_rows, smallest_effect=doubt.smallest_effect, repeats=doubt.repeats,
        )  # fmt: skip

    def _floor(self, metric: str, figure: Figure) -> float | None:
        if figure.bounded is None or not self._floors:
            return None
        return max(floor.effect(metric) for floor in self._floors)


def _stepwise(judges: dict[str, _Judge]) -> list[VariantVerdict]:
    """Judge by Holm's step-down: who passes at the level for as many as are left is accepted, then it is relaxed."""
    verdicts: dict[str, VariantVerdict] = {}
    left = list(judges)
    while left:
        verdicts |= {name: judges[name].verdict(len(left)) for name in left}
        accepted = [name for name in left if verdicts[name].outcome == "pass"]
        left = [name for name in left if name not in accepted] if accepted else []
    return [verdicts[name] for name in judges]


_NEVER_GATED = {
    "floor": "the run's noise floor, the baseline against itself",
    "part": "a part of another variant, scored to tell losses apart",
}


def _gated(run: PairedRun, names: Sequence[str]) -> list[VariantRecord]:
    variants = {record.name: record for record in run.record.variants if record.role == "variant"}
    if not variants:
        raise QevalError(f"The run '{run.folder}' has no variant: there is nothing to gate.")
    for name in names:
        if name not in variants and (record := next((r for r in run.record.variants if r.name == name), None)):
            raise UsageError(f"'{name}' is {_NEVER_GATED[record.role]}; it is never gated.")
        if name not in variants:
            raise unknown(f"variant of the run '{run.folder}'", name, variants)
    return [variants[name] for name in dict.fromkeys(names)] or list(variants.values())


def _doubt(figure: Figure, margin: float, confidence: float) -> _Doubt:
    if figure.bounded is None:
        return _NO_DOUBT
    factor = factor_to_decide(figure.bounded, margin, confidence)
    more = None if factor is None else max(1, round((factor - 1) * figure.bounded.mean.n))
    bounded = figure.bounded
    repeats = repeats_to_decide(bounded, margin, confidence) if isinstance(bounded, BoundedScore) else None
    return _Doubt(more, smallest_effect(bounded, confidence), repeats)


def _notes(policy: Policy, records: Sequence[VariantRecord]) -> list[str]:
    idle = [rule.text for rule in policy.rules if not any(rule.holds_for(record.name) for record in records)]
    return [explanations.unmatched(idle)] if idle else []


def _reference_note(earlier: PairedRun | None) -> list[str]:
    if earlier is None:
        return []
    return [
        f"Each variant was held against itself in the run '{earlier.folder.name}' of {earlier.record.started[:10]}, in "
        "the baseline's place."
    ]


def _lost_floors(run: PairedRun) -> list[str]:
    lost = [record for record in run.record.variants if record.role == "floor" and record.status != "done"]
    return [
        f"The noise floor '{record.name}' failed, so no effect is held against it: {record.error}" for record in lost
    ]
