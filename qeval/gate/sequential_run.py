"""Run and gate in one go: rows are drawn in a fixed random order, and the run ends when every rule is decided.

It leans on `compare` by three things alone: `prepare` makes the plan, a plan's windows and questions can be replaced by
some of them, and `run` scores what is not scored yet. So what is left behind is a finished run of the rows that were
drawn, which every other command reads, and a gate that was killed goes on where it stopped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil

import numpy as np

from qeval.compare.plan import Plan, make_plan
from qeval.compare.run import membership, run_comparison
from qeval.compare.settings import TOKEN_METRICS, Settings
from qeval.errors import UsageError
from qeval.gate import explanations
from qeval.gate.judge import run_notes, variant_verdict
from qeval.gate.metrics import RUN_AT_ONCE, kind_of, split
from qeval.gate.policy import Policy
from qeval.gate.sequential import Drawn, Key, look
from qeval.gate.verdict import GateVerdict, RuleVerdict, VariantVerdict
from qeval.progress import Progress
from qeval.report.contamination import void
from qeval.report.independent import is_first_text, question_notes, window_clusters
from qeval.report.run_rows import PairedRun
from qeval.score.choices import prompt_sha256
from qeval.score.corpus import Shard
from qeval.stats.sequential import BURN_IN
from qeval.store.ledger import Ledger
from qeval.store.run import ProtocolRecord, TaskRecord
from qeval.tasks.harness import Question, Suite
from qeval.tasks.windows import Window

LOOKS = (0.05, 0.085, 0.11, 0.13, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The shares of all rows after which rules are looked at; more looks would cost no certainty, only time."""


def tasks_of(policy: Policy, variant: str) -> tuple[str, ...]:
    """Return what has to be scored for the policy's rules about a variant.

    Raises:
        UsageError: none of its rules is about it, or none rests on rows.
    """
    rules = [rule for rule in policy.rules if rule.holds_for(variant)]
    needed = [split(rule.metric)[0] or kind_of(rule.metric).source for rule in rules]
    tasks = tuple(dict.fromkeys(task for task in needed if task != "size"))
    if not tasks:
        raise UsageError(f"No rule of the policy '{policy.name}' about '{variant}' needs a run.")
    return tasks


def run_and_judge(settings: Settings, policy: Policy, progress: Progress) -> GateVerdict:
    """Score as many rows of the one variant of `settings` as the policy's rules take, and judge them.

    Raises:
        UsageError: something that was asked for is not there or does not fit, or there are too few windows.
    """
    pool = Pool(make_plan(settings))
    if pool.plan.responses:
        raise UsageError(
            f"{pool.plan.responses[0].info.name} is answered whole before anything is judged; run qeval compare, then "
            "gate the finished run."
        )
    if pool.windows and len(set(pool.stretches.values())) < BURN_IN:
        raise UsageError(
            f"A gate that may stop early decides nothing from fewer than {BURN_IN} windows, and there are "
            f"{len(set(pool.stretches.values()))} of distinct text; give a longer --corpus or a smaller --window, or "
            "gate a finished run."
        )
    with membership(pool.plan, progress, shared=False) as ledger:
        return _judged(pool, policy, progress, ledger)


def _judged(pool: "Pool", policy: Policy, progress: Progress, ledger: Ledger) -> GateVerdict:
    settings = pool.plan.settings
    open_tasks, part = set(settings.tasks), DrawnPart({}, 0)
    for share in LOOKS:
        part = pool.draw(part, share, open_tasks)
        record = run_comparison(pool.plan_of(part), progress, ledger)
        (variant,) = record.variants
        if variant.status != "done":
            error = f"'{variant.name}' failed in this run: {variant.error}"
            return _verdict_of(settings, policy, VariantVerdict(variant.name, "broken", (), error), part.words(pool))
        if why := void(record, variant):
            return _verdict_of(settings, policy, VariantVerdict(variant.name, "broken", (), why), part.words(pool))

        # judge the rows so far; go on with what is undecided
        rows = PairedRun(settings.out, is_running=True)
        rules = look(rows, variant, policy, pool.drawn(part))
        open_tasks = _undecided(rules)
        if not open_tasks or any(rule.outcome == "broken" for rule in rules):
            break

    verdict = variant_verdict(policy, rows, variant, rules)
    return _verdict_of(settings, policy, verdict, part.words(pool), *pool.repeat_notes, *run_notes(rows))


@dataclass(frozen=True)
class DrawnPart:
    """The size of the drawn sample: the ends of each look's questions, a task, and the number of windows."""

    questions: dict[str, tuple[int, ...]]
    windows: int

    def words(self, pool: "Pool") -> str:
        """Return what was drawn, in a sentence."""
        counts = [f"{self.windows:,} of {len(pool.windows):,} windows"] if pool.windows else []
        counts += [f"all {pool.plan.drift.prompts:,} prompts to continue"] if pool.plan.drift else []
        counts += [f"all {len(each.traces):,} traces of {each.task}" for each in pool.plan.traces.sets]
        counts += [f"all {len(pool.plan.haystacks):,} haystacks"] if pool.plan.haystacks else []
        for suite in pool.plan.suites:
            ends = self.questions.get(suite.info.name, ())
            total = len(pool.questions[suite.info.name])
            counts.append(f"{ends[-1] if ends else 0:,} of {total:,} questions of {suite.info.name}")
        return f"Drawn in a random order until every rule was decided or nothing was left: {', '.join(counts)}."


class Pool:
    """Everything that a plan could score, in the order in which it is drawn (by the plan's seed)."""

    def __init__(self, plan: Plan) -> None:
        """Nothing is drawn yet."""
        self.plan = plan

    @cached_property
    def windows(self) -> list[tuple[int, Window]]:
        """The windows with their numbers, as drawn: those that overlap in a row, none that repeats others."""
        together: dict[int, list[tuple[int, Window]]] = {}
        for number, window in self._numbered:
            if number in self.stretches:
                together.setdefault(self.stretches[number], []).append((number, window))
        stretches = list(together.values())
        return [window for i in self._order(len(stretches), "windows") for window in stretches[i]]

    @cached_property
    def stretches(self) -> dict[int, int]:
        """The stretch of text that each window is of; windows that repeat others are left out."""
        if self.plan.protocol is None:
            return {}
        scored = [sorted({*window.kl_positions, *window.nll_positions}) for _, window in self._numbered]
        rows = np.repeat(
            np.array([number for number, _ in self._numbered], np.int64), [len(positions) for positions in scored]
        )
        tokens = [w.tokens[p] for (_, w), positions in zip(self._numbered, scored, strict=True) for p in positions]
        clusters = window_clusters(rows, np.array(tokens, np.int64), self.plan.protocol)
        counted = is_first_text(rows, clusters, self.plan.protocol)
        return dict(zip(rows[counted].tolist(), clusters[counted].tolist(), strict=True))

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """Each task's questions as drawn, none with the token ids of another."""
        return {suite.info.name: self._distinct(suite) for suite in self.plan.suites}

    @property
    def repeat_notes(self) -> list[str]:
        """Sentences on what repeats or overlaps, and so is not drawn or not counted by itself."""
        notes = []
        left_out = len(self._numbered) - len(self.windows)
        if left_out:
            notes.append(f"{left_out:,} windows hold text that stands in others already; they are not drawn.")
        if len(set(self.stretches.values())) < len(self.windows):
            notes.append(f"Windows overlap: {len(set(self.stretches.values())):,} stretches of text count.")
        for suite in self.plan.suites:
            notes += question_notes(suite.info.title, np.array(self._prompts(suite), np.object_))
        return notes

    @property
    def _numbered(self) -> list[tuple[int, Window]]:
        return [(n, window) for shard in self.plan.shards for n, window in enumerate(shard.windows, shard.first)]

    @staticmethod
    def _prompts(suite: Suite) -> list[str]:
        return [prompt_sha256(question) for question in suite.questions]

    def _distinct(self, suite: Suite) -> list[Question]:
        first = {prompt: place for place, prompt in reversed(list(enumerate(self._prompts(suite))))}
        counted = sorted(first.values())
        return [suite.questions[counted[i]] for i in self._order(len(counted), suite.info.name)]

    def draw(self, part: DrawnPart, share: float, tasks: Iterable[str]) -> DrawnPart:
        """Return `part` with more of what the open `tasks` rest on, up to `share` of it."""
        wanted = set(tasks)
        windows = self._whole(ceil(share * len(self.windows))) if wanted & set(TOKEN_METRICS) else part.windows
        questions = {
            name: (*part.questions.get(name, ()), *((ceil(share * len(pool)),) if name in wanted else ()))
            for name, pool in self.questions.items()
        }
        return DrawnPart(questions, windows)

    def _whole(self, windows: int) -> int:
        """Return so many windows, and those that the last of them overlaps with."""
        while 0 < windows < len(self.windows) and self._stretch(windows) == self._stretch(windows - 1):
            windows += 1
        return windows

    def _stretch(self, place: int) -> int:
        return self.stretches[self.windows[place][0]]

    def drawn(self, part: DrawnPart) -> Drawn:
        """Return what was drawn, by the names that rows have."""
        keys: dict[str, tuple[Key, ...]] = {
            name: tuple((question.subject, question.item) for question in questions[: part.questions[name][-1]])
            for name, questions in self.questions.items()
        }
        numbers = tuple(number for number, _ in self.windows[: part.windows])
        in_all = {name: len(questions) for name, questions in self.questions.items()}
        return Drawn(numbers, len(self.windows), keys, in_all, self.stretches)

    def plan_of(self, part: DrawnPart) -> Plan:
        """Return the plan of a part: a shard a window; a suite a look, so that finished answers are found again."""
        windows = sorted(self.windows[: part.windows], key=lambda numbered: numbered[0])
        suites = [suite for whole in self.plan.suites for suite in self._suites(whole, part)]
        return replace(
            self.plan,
            is_drawn=True,
            shards=tuple(Shard(number, (window,)) for number, window in windows),
            suites=tuple(suites),
            protocol=self.plan.protocol and _protocol(self.plan.protocol, [window for _, window in windows]),
            tasks=tuple(_task(whole, self._first(whole, part)) for whole in self.plan.suites),
        )

    def _suites(self, whole: Suite, part: DrawnPart) -> list[Suite]:
        ends = part.questions[whole.info.name]
        questions = self.questions[whole.info.name]
        looks = [questions[start:end] for start, end in zip((0, *ends[:-1]), ends, strict=True)]
        return [_suite(whole, look) for look in looks if look]

    def _first(self, whole: Suite, part: DrawnPart) -> list[Question]:
        return self.questions[whole.info.name][: part.questions[whole.info.name][-1]]

    def _order(self, count: int, what: str) -> list[int]:
        seed = [self.plan.settings.seed, *what.encode()]
        return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def _undecided(rules: Sequence[RuleVerdict]) -> set[str]:
    """Return the tasks that rules are still open on, and that more can be drawn of."""
    tasks = {split(rule.metric)[0] or kind_of(rule.metric).source for rule in rules if rule.outcome == "inconclusive"}
    return tasks - set(RUN_AT_ONCE)


def _suite(whole: Suite, questions: Sequence[Question]) -> Suite:
    present = {question.subject for question in questions}
    subjects = [subject for subject in whole.info.subjects if subject in present]
    return replace(whole, questions=tuple(questions), info=replace(whole.info, items=len(questions), subjects=subjects))


def _task(whole: Suite, questions: Sequence[Question]) -> TaskRecord:
    fewer = sum(question.shots < whole.info.shots for question in questions)
    return TaskRecord(**asdict(_suite(whole, questions).info) | {"items_with_fewer_shots": fewer})


def _protocol(record: ProtocolRecord, windows: Sequence[Window]) -> ProtocolRecord:
    """Return the record of some of the windows; the hashes stay those of the whole text and all its tokens."""
    return record.model_copy(
        update={
            "windows": len(windows),
            "kl_positions": sum(len(window.kl_positions) for window in windows),
            "nll_positions": sum(len(window.nll_positions) for window in windows),
            "words": None,
            "bytes": None,
        }
    )


def _verdict_of(settings: Settings, policy: Policy, verdict: VariantVerdict, *notes: str) -> GateVerdict:
    return GateVerdict(
        run=str(settings.out), policy=policy.name, outcome=verdict.outcome,
        correction=explanations.correction("every", 1), variants=(verdict,), notes=notes,
    )  # fmt: skip
