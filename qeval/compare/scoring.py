"""The jobs of a run: the baseline's and each variant's rows, over shards of windows and subjects of questions."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qeval.backends.base import Backend, Session
from qeval.executors.local import Job, run_jobs
from qeval.identity import digest
from qeval.metrics.tokens import Logits
from qeval.progress import Advance, Progress
from qeval.quant.variant import Variant
from qeval.score.choices import (
    QUESTIONS_VERSION,
    item_columns,
    prompt_sha256,
    question_tokens,
    score_questions,
)
from qeval.score.corpus import (
    METRICS_VERSION,
    Shard,
    baseline_columns,
    variant_columns,
    window_states,
)
from qeval.store.rows import Kind, RowStore
from qeval.store.states import StateStore
from qeval.store.variants import load_variant
from qeval.tasks.harness import Question, Suite

_LABELS: dict[Kind, str] = {"tokens": "corpus", "items": "questions"}


@dataclass(frozen=True, eq=False)
class Work:
    """What every variant of a run is scored on, and where the rows go."""

    shards: tuple[Shard, ...]
    corpus: str
    suites: tuple[Suite, ...]
    rows: RowStore
    states: StateStore
    baseline_key: str
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

    def __init__(self, backend: Backend, name: str, key: str, folder: Path | None, base_logits: Logits) -> None:
        """The baseline has no folder; `key` is the identity of the weights."""
        self.name = name
        self._backend, self._key, self._folder, self._base_logits = backend, key, folder, base_logits
        self._open = ExitStack()
        self._session: Session | None = None

    def close(self) -> None:
        """Put the baseline's weights back."""
        self._open.close()
        self._session = None

    def corpus_job(self, work: Work, shard: Shard) -> Job:
        """Token rows of one shard."""
        key = digest({**self._identity(), "metrics": METRICS_VERSION, "corpus": work.corpus, **shard.key()})

        def run(advance: Advance) -> Path:
            names = {"variant": self.name, "backend": self._backend.name, "corpus": work.corpus}
            if self.is_baseline:
                base = self.baseline_states(work, shard, advance)
                columns = baseline_columns(self._opened(), shard, base, names)
            else:
                base = self.baseline_states(work, shard, _to_nobody)
                session = self._opened()
                states = window_states(session, shard.windows, work.batch_tokens, advance)
                columns = variant_columns(self._base_logits, base, session, states, shard, names)
            return work.rows.write("tokens", key, columns)

        return Job(shard.tokens, lambda: work.rows.find("tokens", key, work.progress.warn), run)

    def question_job(self, work: Work, suite: Suite, questions: Sequence[Question]) -> Job:
        """Item rows of some questions of one subject."""
        asked = [[q.subject, q.item, q.gold, prompt_sha256(q)] for q in questions]
        key = digest({**self._identity(), "questions": QUESTIONS_VERSION, "task": suite.info.name, "asked": asked})

        def run(advance: Advance) -> Path:
            scores = score_questions(self._opened(), questions, work.batch_tokens, advance)
            columns = item_columns(suite, questions, scores, self.name, self._backend.name)
            return work.rows.write("items", key, columns)

        units = question_tokens(questions)
        return Job(units, lambda: work.rows.find("items", key, work.progress.warn), run)

    def baseline_states(self, work: Work, shard: Shard, advance: Advance) -> Tensor:
        """The baseline's final states of a shard, from the cache or computed; never while a variant is installed."""
        key = digest({"baseline": work.baseline_key, **shard.key()})
        states = work.states.read(key)
        if states is None:
            with torch.inference_mode(), self._backend.open(None) as session:
                states = window_states(session, shard.windows, work.batch_tokens, advance)
            work.states.write(key, states)
        return states

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unquantized model."""
        return self._folder is None

    def _identity(self) -> dict[str, str]:
        return {"name": self.name, "backend": self._backend.name, "weights": self._key}

    def _opened(self) -> Session:
        if self._session is None:
            variant: Variant | None = None if self._folder is None else load_variant(self._folder)
            self._session = self._open.enter_context(self._backend.open(variant))
        return self._session


def score(work: Work, scorer: Scorer) -> dict[Kind, list[Path]]:
    """All records of one model; what is there already is not made again."""
    jobs = work.jobs(scorer)
    if not scorer.is_baseline:
        _complete_baseline(work, scorer, jobs["tokens"])
    done: dict[Kind, list[Path]] = {"tokens": [], "items": []}
    try:
        for kind, label in _LABELS.items():
            units = sum(job.units for job in jobs[kind])
            if units:
                with work.progress.phase(f"score {scorer.name}: {label}", units) as advance:
                    done[kind] = run_jobs(jobs[kind], advance)
    finally:
        scorer.close()
    return done


def _complete_baseline(work: Work, scorer: Scorer, jobs: Sequence[Job]) -> None:
    """Make sure of the baseline's states before a variant takes its place in memory."""
    for shard, job in zip(work.shards, jobs, strict=True):
        if job.find() is None:
            scorer.baseline_states(work, shard, _to_nobody)


def _to_nobody(done: int) -> None:
    del done
