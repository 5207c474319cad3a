"""The models of a run: each is scored on one backend and put on record; what others are compared with keeps states.

From a run to a session's forward pass: `score_all`, `ScoredModel.score`, `run_jobs`, a job's `run`, `window_states`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from qeval.backends.base import Backend, BaselineBackend, Session, Target
from qeval.backends.memory import reason_of
from qeval.compare.record import failed_record
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.executors.local import Share, claimed, run_jobs
from qeval.files.atomic import write_text
from qeval.files.locks import alone
from qeval.identity import digest
from qeval.metrics.tokens import Logits
from qeval.models.device import release_cached
from qeval.progress import Advance
from qeval.score.corpus import Shard, window_states
from qeval.score.drift import DRIFT_VERSION, Continuation, DriftPart, part_states
from qeval.score.jobs import CorpusJob, DriftJob, QuestionJob, ResponseJob, ScoringJob, TraceJob, Work, ignore
from qeval.score.needle import NeedleJob
from qeval.store.ledger import JobId
from qeval.store.rows import RowKind
from qeval.store.run import RuntimeRecord, VariantRecord
from qeval.store.states import StateStore

_LABELS: dict[RowKind, str] = {
    "tokens": "corpus",
    "items": "questions",
    "drift": "continuations",
    "needle": "needles",
    "scores": "tasks",
    "traces": "traces",
}


class ScoredSubject(Protocol):
    """A model of a run: a variant, a folder that another tool made, or the float model."""

    @property
    def method(self) -> str:
        """The method that quantized it."""
        ...

    @property
    def target(self) -> Target:
        """The target that a backend opens."""
        ...

    def record(self, name: str, backend: str, seconds: float) -> VariantRecord:
        """Return what the run says of it; `seconds` is how long scoring took."""
        ...


@dataclass(eq=False, kw_only=True)
class ScoredModel:
    """One model of a run on one backend: its rows, or why it failed.

    Attributes:
        name: As rows and reports have it.
        variant: What it is.
        backend: What runs it.
        key: What of the weights and the backend changes numbers.
        out: The run's folder.
        twin: The same weights on the baseline's backend, which it is compared with too.
        error: Why it can't be scored.
        seconds: How long scoring took here.
    """

    name: str
    variant: ScoredSubject
    backend: Backend[Any]
    key: Mapping[str, Any]
    out: Path
    twin: "ReferenceModel | None" = None
    error: str | None = None
    is_baseline: bool = False
    seconds: float = field(default=0.0, init=False)
    _records: dict[RowKind, list[Path | None]] = field(default_factory=dict, init=False)
    _jobs: list[ScoringJob] = field(default_factory=list, init=False)
    _session: Session | None = field(default=None, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def backend_name(self) -> str:
        """The backend's name in rows."""
        return self.backend.name

    @property
    def is_open(self) -> bool:
        """Return whether another process was at one of the jobs when they were last looked at."""
        return any(None in paths for paths in self._records.values())

    def score(self, work: Work, *, wait: bool) -> None:
        """Score what is missing; a failure is told and kept, but for the baseline's.

        Args:
            work: What it is scored on.
            wait: Whether what other processes are at is waited for; without, it stays missing.

        Raises:
            UsageError: What was asked for can't be done.
            QevalError, RuntimeError: A job of the baseline failed.
        """
        if self.error is not None or (self._records and not self.is_open):
            return
        start = time.perf_counter()
        try:
            jobs = self.jobs(work)
            if work.share is None:
                self._require_baseline()
                for kind, each in jobs.items():
                    with self._phase(work, kind, each) as advance:
                        self._records[kind] = run_jobs(each, work.ledger, advance, wait=wait)
            else:
                self._records = self._run_together(jobs, work, work.share, wait=wait)
            self.seconds += time.perf_counter() - start
            return
        except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
            if self.is_baseline or isinstance(error, UsageError):
                raise
            self.error = reason_of(error, f"scoring {self.name}", work.device)
        finally:
            self.close()
        release_cached()
        work.progress.warn(f"{self.name} failed: {self.error}")

    def _require_baseline(self) -> None:
        """Have the baseline done before a variant takes its place: one set of weights is in memory at a time."""
        for job in () if self.is_baseline else self._jobs:
            if job.find() is None:
                job.require_baseline()

    def _phase(self, work: Work, kind: RowKind, jobs: Sequence[ScoringJob]) -> AbstractContextManager[Advance]:
        """Return the phase that shows the progress of some jobs; of none nothing is shown."""
        units = sum(job.units for job in jobs)
        return work.progress.phase(f"score {self.name}: {_LABELS[kind]}", units) if units else nullcontext(ignore)

    def _run_together(
        self, jobs: Mapping[RowKind, Sequence[ScoringJob]], work: Work, share: Share, *, wait: bool
    ) -> dict[RowKind, list[Path | None]]:
        """Return the records of a worker's share, or with `wait` of all jobs: those of others once they have them.

        The session is told of claimed jobs alone: it runs everything that it expects in one pass over the layers.
        """
        left = {kind: list(each) if wait else share.of(each) for kind, each in jobs.items()}
        found: dict[JobId, Path] = {}
        while True:
            with claimed([job for each in left.values() for job in each], work.ledger) as self._jobs:
                mine = {job.id for job in self._jobs}
                ready = {kind: [job for job in each if job.id in mine or job.find()] for kind, each in left.items()}
                self._require_baseline()
                for kind, each in ready.items():
                    with self._phase(work, kind, each) as advance:
                        records = run_jobs(each, work.ledger, advance, wait=False)
                    found |= {job.id: path for job, path in zip(each, records, strict=True) if path}
            self.close()  # the next round expects other jobs

            left = {kind: [job for job in each if job.id not in found] for kind, each in left.items()}
            if not wait or not any(left.values()):
                return {kind: [found.get(job.id) for job in each] for kind, each in jobs.items()}
            work.ledger.pause()

    def jobs(self, work: Work) -> dict[RowKind, list[ScoringJob]]:
        """Return the jobs on everything, which the next session will be told of."""
        jobs: dict[RowKind, list[ScoringJob]] = {
            "tokens": [CorpusJob(self, work, shard) for shard in work.shards],
            "items": [QuestionJob(self, work, suite, part) for suite in work.suites for part in suite.parts()],
            "drift": [DriftJob(self, work, part) for part in work.parts],
            "needle": [NeedleJob(self, work, haystack) for haystack in work.haystacks],
            "scores": [ResponseJob(self, work, suite, part) for suite in work.responses for part in suite.parts()],
            "traces": [TraceJob(self, work, part) for part in work.traces],
        }
        self._jobs = [job for each in jobs.values() for job in each]
        return jobs

    def expect_only(self, ids: Collection[JobId]) -> None:
        """Tell the next session of these jobs alone."""
        self._jobs = [job for job in self._jobs if job.id in ids]

    def job_ids(self, work: Work) -> set[tuple[str, str]]:
        """Return the kind and key of every job; none where it can't be scored."""
        if self.error is not None:
            return set()
        return {(job.id.kind, job.id.key) for jobs in self.jobs(work).values() for job in jobs}

    def paths(self, kind: RowKind) -> list[Path]:
        """Return the records of a kind that are there."""
        return [path for path in self._records.get(kind, []) if path is not None]

    def record(self) -> VariantRecord:
        """Return what the run says of it."""
        if self.error is not None:
            return failed_record(self.name, self.variant.method, self.backend.name, self.error)
        record = self.variant.record(self.name, self.backend.name, self.seconds)
        details = dict(record.details)
        if not self.backend.fake_quantizes:
            details.pop("computed", None)  # that is said of torch
        twin = self.twin.name if self.twin else None
        return record.model_copy(update={"runtime": self._runtime(), "twin": twin, "details": details})

    @contextmanager
    def open(self) -> Iterator[Session]:
        """Open the model for the length of the block, and write down how it is run."""
        with self.backend.open(self.variant.target) as session:
            if record := self.backend.describe(session, self.variant.target):
                write_text(self._runtime_path, record.model_dump_json(indent=1) + "\n")
            yield session

    def session(self) -> Session:
        """Return the model's session, which stays open until `close`."""
        if self._session is None:
            self._session = self._open.enter_context(self.open())
            session = self._session
            session.expect(call for job in self._jobs if job.find() is None for call in job.calls(session))
        return self._session

    def close(self) -> None:
        """Close the session, which puts the baseline's weights back."""
        self._open.close()
        self._session = None

    def keep_states(self, shard: Shard, states: Tensor) -> None:
        """Do nothing: no other model is compared with this one."""

    @property
    def _runtime_path(self) -> Path:
        return self.out / "runtimes" / f"{digest(self.key)}.json"

    def _runtime(self) -> RuntimeRecord | None:
        """Return how the model ran; None where it never did, since there was nothing to score, and for torch."""
        try:
            return RuntimeRecord.model_validate_json(self._runtime_path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise BrokenRecordError(f"{self._runtime_path} is torn; delete it and the rows beside it.") from error


@dataclass(eq=False, kw_only=True)
class ReferenceModel(ScoredModel):
    """A model that others are compared with: its final states are kept in `store`, and computed where they lack."""

    backend: BaselineBackend[Any]
    store: StateStore

    def logits(self) -> Logits:
        """Return the head that makes logits of the states."""
        return self.backend.head_for(self.variant.target).logits

    def states(self, shard: Shard, batch_tokens: int, advance: Advance) -> Tensor:
        """Return the states of a shard's windows, [positions, width]; one process at a time computes them."""
        compute = partial(window_states, windows=shard.windows, batch_tokens=batch_tokens, advance=advance)
        return self._kept(self._states_key(shard), compute)

    def continuation(self, part: DriftPart, batch_tokens: int, advance: Advance) -> Continuation:
        """Return what the model says greedily after a part's prompts, kept as states are: an id is exact in fp32."""
        key = digest({"continuation": dict(self.key), "version": DRIFT_VERSION, **part.key()})
        tokens = self._kept(key, lambda session: session.greedy(part.prompts, part.count)).cpu().long()
        compute = partial(part_states, part=part, tokens=tokens, batch_tokens=batch_tokens, advance=advance)
        return Continuation(tokens, self._kept(digest({"states along": key}), compute))

    def keep_states(self, shard: Shard, states: Tensor) -> None:
        """Keep the states of a shard."""
        self.store.write(self._states_key(shard), states)

    def _states_key(self, shard: Shard) -> str:
        return digest({"states": dict(self.key), **shard.key()})

    def _kept(self, key: str, compute: Callable[[Session], Tensor]) -> Tensor:
        states = self.store.read(key)
        if states is not None:
            return states
        # A lock a key would leave as many files as there are shards; with few, workers wait that stream other shards.
        with alone(f"states-{key[:3]}"):
            states = self.store.read(key)
            if states is None:
                with torch.inference_mode(), self.open() as session:
                    states = compute(session)
                self.store.write(key, states)
        return states
