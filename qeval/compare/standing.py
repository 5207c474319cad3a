"""How far each model of a run is: its records as they come, made here or by another process of the run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qeval.compare.candidates import Contender
from qeval.compare.prepare import Plan
from qeval.compare.scoring import Kept, Scorer, Work, score
from qeval.errors import QevalError, UsageError
from qeval.progress import Progress
from qeval.store.ledger import Ledger
from qeval.store.rows import Kind, RowStore
from qeval.store.run import VariantRecord


def work_of(plan: Plan, baseline: Kept, ledger: Ledger, progress: Progress) -> Work:
    """What every model of the plan is scored on."""
    return Work(
        shards=plan.shards,
        corpus=plan.protocol.corpus if plan.protocol else "",
        suites=plan.suites,
        parts=plan.parts,
        continued=plan.drift.corpus if plan.drift else "",
        rows=RowStore(plan.settings.out),
        ledger=ledger,
        baseline=baseline,
        batch_tokens=plan.batch_tokens,
        progress=progress,
    )


class Scored:
    """One model's records as they come: made here, or by another process of the run."""

    def __init__(self, work: Work, scorer: Callable[[], Scorer]) -> None:
        """Nothing is scored yet; `scorer` is asked for a new one each time."""
        self._work, self._scorer = work, scorer
        self._found: dict[Kind, list[Path | None]] | None = None
        self.seconds = 0.0
        """How long scoring took here."""

    def score(self, *, wait: bool) -> None:
        """Score what is missing; without `wait`, what others are at stays missing.

        Raises:
            QevalError, RuntimeError: a job failed.
        """
        if self._found is not None and not self.is_open:
            return
        start = time.perf_counter()
        self._found = score(self._work, self._scorer(), wait=wait)
        self.seconds += time.perf_counter() - start

    def tickets(self) -> set[tuple[str, str]]:
        """The kind and key of every job."""
        jobs = self._work.jobs(self._scorer())
        return {(job.ticket.kind, job.ticket.key) for each in jobs.values() for job in each}

    @property
    def is_open(self) -> bool:
        """Whether another process was at one of the jobs when they were last looked at."""
        return self._found is not None and any(None in paths for paths in self._found.values())

    def paths(self, kind: Kind) -> list[Path]:
        """The records of a kind that are there."""
        found = [] if self._found is None else self._found[kind]
        return [path for path in found if path is not None]


class Model:
    """One variant on one backend: its rows, or why it failed."""

    def __init__(self, work: Work, contender: Contender) -> None:
        """Nothing is scored yet."""
        self._work, self._contender = work, contender
        self._error = contender.error
        self.scored = Scored(work, contender.scorer)

    def score(self, *, wait: bool) -> None:
        """As `Scored.score`, but a failure is told and kept.

        Raises:
            UsageError: what was asked for can't be done.
        """
        if self._error is not None:
            return
        try:
            self.scored.score(wait=wait)
        except UsageError:
            raise
        except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
            self._work.progress.warn(f"{self._contender.name} failed: {error}")
            self._error = str(error)

    def tickets(self) -> set[tuple[str, str]]:
        """As `Scored.tickets`; none where it can't be scored."""
        return set() if self._error is not None else self.scored.tickets()

    def record(self) -> VariantRecord:
        """What the run says of it."""
        if self._error is not None:
            return self._contender.failed(self._error)
        return self._contender.record(self.scored.seconds)


def score_all(first: Scored, models: Sequence[Model], work: Work) -> None:
    """Score the models that come after the baseline, then wait for what others are at, the baseline's part first."""
    for model in models:
        model.score(wait=False)
    if any(each.is_open for each in (first, *(model.scored for model in models))) and (others := work.ledger.at_work()):
        work.progress.tell(f"Waiting for {' and '.join(others)}: at work on what is left of this run.")
    first.score(wait=True)
    for model in models:
        model.score(wait=True)
