"""The jobs of a run: the baseline's and each model's rows, over shards of windows and subjects of questions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qeval.backends.base import LooksAhead, Session
from qeval.executors.local import Job, run_jobs
from qeval.identity import digest
from qeval.metrics.tokens import Logits
from qeval.progress import Advance, Progress
from qeval.score.choices import (
    QUESTIONS_VERSION,
    item_columns,
    prompt_sha256,
    question_calls,
    question_tokens,
    score_questions,
)
from qeval.score.corpus import (
    METRICS_VERSION,
    Shard,
    baseline_columns,
    variant_columns,
    window_calls,
    window_states,
)
from qeval.store.ledger import Ledger, Ticket
from qeval.store.locks import alone
from qeval.store.rows import Kind, RowStore
from qeval.store.states import StateStore
from qeval.tasks.harness import Question, Suite
from qeval.types import Call

_LABELS: dict[Kind, str] = {"tokens": "corpus", "items": "questions"}

Opener = Callable[[], AbstractContextManager[Session]]
Run = Callable[[Advance], Path]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One model to score: the name and backend in its rows, what of it changes numbers, and how to open it.

    `is_baseline`: what all others are compared with. `keeps_states`: its states are wanted by another candidate.
    """

    name: str
    backend: str
    key: Mapping[str, Any]
    open: Opener
    is_baseline: bool = False
    keeps_states: bool = False


@dataclass(frozen=True, eq=False)
class Kept:
    """Final states of a model, read from a store, or computed with the model opened for it."""

    candidate: Candidate
    store: StateStore
    logits: Callable[[], Logits]
    """The head that makes logits of the states; asked for when they are needed."""

    def states(self, shard: Shard, batch_tokens: int, advance: Advance) -> Tensor:
        """The states of a shard's windows, [positions, width]; one process at a time computes them."""
        key = self.key(shard)
        states = self.store.read(key)
        if states is not None:
            return states
        with alone(f"states-{key[:2]}"):  # a lock a key would leave as many files as there are shards
            states = self.store.read(key)
            if states is None:
                with torch.inference_mode(), self.candidate.open() as session:
                    states = window_states(session, shard.windows, batch_tokens, advance)
                self.store.write(key, states)
        return states

    def key(self, shard: Shard) -> str:
        """What the states of a shard are kept under."""
        return digest({"states": dict(self.candidate.key), **shard.key()})


@dataclass(frozen=True, eq=False)
class Work:
    """What every model of a run is scored on, what it is compared with, and where the rows go."""

    shards: tuple[Shard, ...]
    corpus: str
    suites: tuple[Suite, ...]
    rows: RowStore
    ledger: Ledger
    baseline: Kept
    batch_tokens: int
    progress: Progress

    def jobs(self, scorer: "Scorer") -> dict[Kind, list[Job]]:
        """The jobs of one model on everything."""
        return {
            "tokens": [scorer.corpus_job(self, shard) for shard in self.shards],
            "items": [scorer.question_job(self, suite, part) for suite in self.suites for part in suite.parts()],
        }


class Scorer:
    """One model of a run: opened only if one of its records is missing."""

    def __init__(self, candidate: Candidate, *, twin: Kept | None = None, kept: Kept | None = None) -> None:
        """`twin`: the same weights on another backend, to compare with; `kept`: where own states go."""
        self.candidate = candidate
        self._twin, self._kept = twin, kept
        self._open = ExitStack()
        self._session: Session | None = None
        self._ahead: list[tuple[Callable[[], Path | None], Callable[[Session], list[Call]]]] = []
        """Of each job: whether its record is there, and what it will ask its session for."""

    def close(self) -> None:
        """Put the baseline's weights back."""
        self._open.close()
        self._session = None

    def corpus_job(self, work: Work, shard: Shard) -> Job:
        """Token rows of one shard."""
        twin = None if self._twin is None else dict(self._twin.candidate.key)
        key = digest(
            {**self._identity(), "twin": twin, "metrics": METRICS_VERSION, "corpus": work.corpus, **shard.key()}
        )

        def run(advance: Advance) -> Path:
            names = {"variant": self.candidate.name, "backend": self.candidate.backend, "corpus": work.corpus}
            if self.candidate.is_baseline:
                session = self._opened()
                base = work.baseline.states(shard, work.batch_tokens, advance)
                columns = baseline_columns(session, shard, base, names)
            else:
                columns = self._compared(work, shard, names, advance)
            return work.rows.write("tokens", key, columns)

        def calls(_: Session) -> list[Call]:
            return window_calls(shard.windows, work.batch_tokens)

        return self._job(work, "tokens", key, shard.tokens, run, calls)

    def question_job(self, work: Work, suite: Suite, questions: Sequence[Question]) -> Job:
        """Item rows of some questions of one subject."""
        asked = [[q.subject, q.item, q.gold, prompt_sha256(q)] for q in questions]
        key = digest({**self._identity(), "questions": QUESTIONS_VERSION, "task": suite.info.name, "asked": asked})

        def run(advance: Advance) -> Path:
            scores = score_questions(self._opened(), questions, work.batch_tokens, advance)
            columns = item_columns(suite, questions, scores, self.candidate.name, self.candidate.backend)
            return work.rows.write("items", key, columns)

        def calls(session: Session) -> list[Call]:
            return question_calls(questions, work.batch_tokens, packs=session.packs)

        return self._job(work, "items", key, question_tokens(questions), run, calls)

    def _job(
        self,
        work: Work,
        kind: Kind,
        key: str,
        units: int,
        run: Callable[[Advance], Path],
        calls: Callable[[Session], list[Call]],
    ) -> Job:
        ticket = Ticket(kind, key, self.candidate.name)
        job = Job(ticket, units, lambda: work.rows.find(kind, key, work.progress.warn), run)
        self._ahead.append((job.find, calls))
        return job

    def _compared(self, work: Work, shard: Shard, names: dict[str, str], advance: Advance) -> dict[str, Any]:
        base = work.baseline.states(shard, work.batch_tokens, _to_nobody)
        twin = None
        if self._twin is not None:
            twin = (self._twin.logits(), self._twin.states(shard, work.batch_tokens, _to_nobody))
        session = self._opened()
        states = window_states(session, shard.windows, work.batch_tokens, advance)
        if self._kept is not None:
            self._kept.store.write(self._kept.key(shard), states)
        return variant_columns(work.baseline.logits(), base, session, states, shard, names, twin)

    def _identity(self) -> dict[str, Any]:
        return {"name": self.candidate.name, "backend": self.candidate.backend, "model": dict(self.candidate.key)}

    def _opened(self) -> Session:
        if self._session is None:
            self._session = self._open.enter_context(self.candidate.open())
            if isinstance(self._session, LooksAhead):
                self._session.expect(
                    [call for find, calls in self._ahead if find() is None for call in calls(self._session)]
                )
        return self._session


def score(work: Work, scorer: Scorer, *, wait: bool = True) -> dict[Kind, list[Path | None]]:
    """All records of one model; what is there already is not made again.

    Without `wait`, None stands for what another process is at.
    """
    jobs = work.jobs(scorer)
    if not scorer.candidate.is_baseline:
        _complete_baseline(work, jobs["tokens"])
    done: dict[Kind, list[Path | None]] = {"tokens": [], "items": []}
    try:
        for kind, label in _LABELS.items():
            units = sum(job.units for job in jobs[kind])
            if units:
                with work.progress.phase(f"score {scorer.candidate.name}: {label}", units) as advance:
                    done[kind] = run_jobs(jobs[kind], work.ledger, advance, wait=wait)
    finally:
        scorer.close()
    return done


def _complete_baseline(work: Work, jobs: Sequence[Job]) -> None:
    """Make sure of the baseline's states before a variant takes its place in memory."""
    for shard, job in zip(work.shards, jobs, strict=True):
        if job.find() is None:
            work.baseline.states(shard, work.batch_tokens, _to_nobody)


def _to_nobody(done: int) -> None:
    del done
