"""The jobs of a run: each makes one record of a model's rows, of a shard of windows, some questions, or prompts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.executors.local import Share
from qeval.identity import digest
from qeval.metrics.tokens import Logits
from qeval.progress import Advance, Progress
from qeval.score.choices import (
    QUESTIONS_VERSION,
    by_question,
    item_columns,
    pair_calls,
    prompt_sha256,
    question_calls,
    question_tokens,
    score_pairs,
)
from qeval.score.corpus import (
    METRICS_VERSION,
    Shard,
    baseline_columns,
    variant_columns,
    window_calls,
    window_states,
)
from qeval.score.drift import DRIFT_VERSION, Continuation, DriftPart, drift_columns, part_states
from qeval.score.generate import Generator, Prompt
from qeval.score.responses import RESPONSES_VERSION, response_columns, response_tokens, summed_responses
from qeval.score.traces import TRACES_VERSION, TracePart, trace_columns
from qeval.store.ledger import JobId, Ledger
from qeval.store.rows import RowKind, RowStore
from qeval.tasks.harness import Question, Suite
from qeval.tasks.needle import Haystack
from qeval.tasks.responses import ResponseItem, ResponseSuite
from qeval.types import Call, Sampler, TokenIds


class Scorable(Protocol):
    """A model as its jobs see it."""

    name: str
    key: Mapping[str, Any]
    """What of it changes numbers."""
    is_baseline: bool

    @property
    def backend_name(self) -> str:
        """The backend's name in rows."""
        ...

    @property
    def twin(self) -> "HasStates | None":
        """The same weights on the baseline's backend, which it is compared with too."""
        ...

    def session(self) -> Session:
        """Return the model's session, opened if it isn't yet."""
        ...

    def keep_states(self, shard: Shard, states: Tensor) -> None:
        """Keep the states of a shard if another model is compared with this one."""
        ...


class HasStates(Scorable, Protocol):
    """A model that others are compared with: its final states are read from the cache, or computed for it."""

    def logits(self) -> Logits:
        """Return the function that makes logits of its states."""
        ...

    def states(self, shard: Shard, batch_tokens: int, advance: Advance) -> Tensor:
        """Return the states of a shard's windows, [positions, width]."""
        ...

    def continuation(self, part: DriftPart, batch_tokens: int, advance: Advance) -> Continuation:
        """Return what it says greedily after a part's prompts."""
        ...


@dataclass(frozen=True, eq=False)
class Work:
    """The work on every model of a run: what it is scored on, what it is compared with, and where the rows go."""

    shards: tuple[Shard, ...]
    corpus: str
    suites: tuple[Suite, ...]
    responses: tuple[ResponseSuite, ...]
    parts: tuple[DriftPart, ...]
    continued: str
    """The corpus that the prompts of `parts` are of."""
    haystacks: tuple[Haystack, ...]
    traces: tuple[TracePart, ...]
    rows: RowStore
    ledger: Ledger
    baseline: HasStates
    sampling: Sampler | None
    """The sampler under which models are compared too."""
    batch_tokens: int
    device: torch.device
    """Where torch computes."""
    progress: Progress
    tokenizer: Any
    """The model's, which makes texts of generated tokens."""
    stops: frozenset[int]
    """Ids that end a generated answer."""
    share: Share | None = None
    """This worker's part of jobs that are run together; None where each is run by itself."""


@dataclass(frozen=True, eq=False)
class ScoringJob(ABC):
    """One record of a model's rows: found by its key, or made by asking the model's session."""

    kind: ClassVar[RowKind]
    model: Scorable
    work: Work

    @cached_property
    def id(self) -> JobId:
        """The job as the ledger knows it."""
        named = {"name": self.model.name, "backend": self.model.backend_name, "model": dict(self.model.key)}
        return JobId(self.kind, digest({**named, **self.identity()}), self.model.name)

    def find(self) -> Path | None:
        """Return the record if it is there already."""
        return self.work.rows.find(self.kind, self.id.key, self.work.progress.warn)

    @property
    @abstractmethod
    def units(self) -> int:
        """Tokens that `run` tells its `advance` of, in all."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what of the job changes its rows, but for the model."""

    @abstractmethod
    def require_baseline(self) -> None:
        """Compute what of the baseline the model is compared with, unless it is in the cache."""

    @abstractmethod
    def calls(self, session: Session) -> list[Call]:
        """Return what `run` will ask the session for, in order."""

    @abstractmethod
    def run(self, advance: Advance) -> Path:
        """Make the record."""


@dataclass(frozen=True, eq=False)
class CorpusJob(ScoringJob):
    """Token rows of one shard."""

    kind = "tokens"
    shard: Shard

    @property
    def units(self) -> int:
        """The shard's tokens."""
        return self.shard.tokens

    def identity(self) -> dict[str, Any]:
        """Return the token ids, the positions, the metrics, and whom else the model is compared with."""
        twin = None if self.model.twin is None else dict(self.model.twin.key)
        sampling = {"sampling": str(self.work.sampling)} if self.work.sampling else {}
        return {"twin": twin, "metrics": METRICS_VERSION, "corpus": self.work.corpus, **sampling, **self.shard.key()}

    def require_baseline(self) -> None:
        """Compute the baseline's states of the shard."""
        self.work.baseline.states(self.shard, self.work.batch_tokens, ignore)

    def calls(self, session: Session) -> list[Call]:
        """Return the shard's windows in batches."""
        return window_calls(self.shard.windows, self.work.batch_tokens)

    def run(self, advance: Advance) -> Path:
        """Score the shard, against the baseline's states where the model isn't the baseline."""
        model, work, shard, batch = self.model, self.work, self.shard, self.work.batch_tokens
        names = {"variant": model.name, "backend": model.backend_name, "corpus": work.corpus}

        if model.is_baseline:
            session = model.session()
            columns = baseline_columns(session, shard, work.baseline.states(shard, batch, advance), names)
        else:
            # What the model is compared with comes first: one set of weights is in memory at a time.
            base = work.baseline.states(shard, batch, ignore)
            twin = None if model.twin is None else (model.twin.logits(), model.twin.states(shard, batch, ignore))
            session = model.session()
            states = window_states(session, shard.windows, batch, advance)
            model.keep_states(shard, states)
            columns = variant_columns(work.baseline.logits(), base, session, states, shard, names, twin, work.sampling)

        return work.rows.write(self.kind, self.id.key, columns)


@dataclass(frozen=True, eq=False)
class QuestionJob(ScoringJob):
    """Item rows of some questions of one subject."""

    kind = "items"
    suite: Suite
    questions: Sequence[Question]

    @property
    def units(self) -> int:
        """The tokens of the distinct sequences."""
        return question_tokens(self.questions)

    def identity(self) -> dict[str, Any]:
        """Return the token ids of the questions, and how they are scored."""
        asked = [[q.subject, q.item, q.gold, prompt_sha256(q)] for q in self.questions]
        return {"questions": QUESTIONS_VERSION, "task": self.suite.info.name, "asked": asked}

    def require_baseline(self) -> None:
        """Do nothing: answers are compared when they are reported."""

    def calls(self, session: Session) -> list[Call]:
        """Return the questions' sequences in batches, prefixes first."""
        return question_calls(self.questions, self.work.batch_tokens, packs=session.packs)

    def run(self, advance: Advance) -> Path:
        """Score every choice of every question."""
        pairs = [pair for question in self.questions for pair in question.pairs]
        scores = score_pairs(self.model.session(), pairs, self.work.batch_tokens, advance)
        columns = item_columns(
            self.suite, self.questions, by_question(scores, self.questions), self.model.name, self.model.backend_name
        )
        return self.work.rows.write(self.kind, self.id.key, columns)


@dataclass(frozen=True, eq=False)
class ResponseJob(ScoringJob):
    """Score rows of some items of one subject of a task without choices."""

    kind = "scores"
    suite: ResponseSuite
    items: Sequence[ResponseItem]

    @property
    def units(self) -> int:
        """The tokens of the distinct prompts, or of the distinct sequences that are scored."""
        return response_tokens(self.items)

    def identity(self) -> dict[str, Any]:
        """Return what the items ask, what the data say of them, and how responses are judged."""
        scores = [[each.name, each.metric, each.filter, sorted(each.lengths.items())] for each in self.suite.scores]
        return {
            "responses": RESPONSES_VERSION,
            "task": self.suite.info.name,
            "judged": self.suite.judged_by,
            "scores": scores,
            "stops": sorted(self.work.stops),
            "asked": [[each.subject, each.item, each.sha256, each.doc_sha256] for each in self.items],
        }

    def require_baseline(self) -> None:
        """Do nothing: scores are compared when they are reported."""

    def calls(self, session: Session) -> list[Call]:
        """Return the items' sequences in batches; none where answers are generated, which depend on one another."""
        if self._generates:
            return []
        return pair_calls(self._pairs, self.work.batch_tokens, packs=session.packs)

    def run(self, advance: Advance) -> Path:
        """Have the model respond to every item, and the harness judge it."""
        model, work = self.model, self.work
        session = model.session()
        if self._generates:
            generator = Generator(session, work.tokenizer, work.stops, work.batch_tokens)
            prompts = [Prompt(item.prompt, item.ending) for item in self.items if item.ending]
            found = generator.answers(prompts, advance)
            columns = response_columns(self.suite, self.items, found, model.name, model.backend_name)
        else:
            scores = score_pairs(session, self._pairs, work.batch_tokens, advance)
            summed = summed_responses(self.suite, self.items, scores)
            columns = response_columns(self.suite, self.items, summed, model.name, model.backend_name)
        return work.rows.write(self.kind, self.id.key, columns)

    @property
    def _generates(self) -> bool:
        return any(item.ending for item in self.items)

    @property
    def _pairs(self) -> list[tuple[TokenIds, TokenIds]]:
        return [pair for item in self.items for pair in item.pairs]


@dataclass(frozen=True, eq=False)
class DriftJob(ScoringJob):
    """Rows along the baseline's greedy continuations of some prompts."""

    kind = "drift"
    part: DriftPart

    @property
    def units(self) -> int:
        """The tokens of prompts and continuations."""
        return self.part.tokens

    def identity(self) -> dict[str, Any]:
        """Return the prompts' token ids, and how they are continued."""
        return {"drift": DRIFT_VERSION, "corpus": self.work.continued, **self.part.key()}

    def require_baseline(self) -> None:
        """Have the baseline continue the prompts."""
        self.work.baseline.continuation(self.part, self.work.batch_tokens, ignore)

    def calls(self, session: Session) -> list[Call]:
        """Return none: what is asked for is known when the baseline has spoken."""
        return []

    def run(self, advance: Advance) -> Path:
        """Score the baseline's continuations."""
        model, work, part = self.model, self.work, self.part
        names = {"variant": model.name, "backend": model.backend_name, "corpus": work.continued}

        base = work.baseline.continuation(part, work.batch_tokens, ignore)
        session, states = model.session(), base.states
        if not model.is_baseline:
            states = part_states(session, part, base.tokens, work.batch_tokens, advance)
        columns = drift_columns(work.baseline.logits(), base, session, states, part, names, own=model.is_baseline)

        return work.rows.write(self.kind, self.id.key, columns)


@dataclass(frozen=True, eq=False)
class TraceJob(ScoringJob):
    """Rows along text that is forced on the model."""

    kind = "traces"
    part: TracePart

    @property
    def units(self) -> int:
        """The tokens of the traces."""
        return self.part.shard.tokens

    def identity(self) -> dict[str, Any]:
        """Return the traces' token ids, and what is looked for in them."""
        return {"traces": TRACES_VERSION, **self.part.key()}

    def require_baseline(self) -> None:
        """Compute the baseline's states along the traces."""
        self.work.baseline.states(self.part.shard, self.work.batch_tokens, ignore)

    def calls(self, session: Session) -> list[Call]:
        """Return the traces in batches."""
        return window_calls(self.part.shard.windows, self.work.batch_tokens)

    def run(self, advance: Advance) -> Path:
        """Score the traces, against the baseline's states where the model isn't the baseline."""
        model, work, shard, batch = self.model, self.work, self.part.shard, self.work.batch_tokens
        names = {"variant": model.name, "backend": model.backend_name}

        if model.is_baseline:
            session = model.session()
            columns = trace_columns(None, session, work.baseline.states(shard, batch, advance), self.part, names)
        else:
            base = work.baseline.logits(), work.baseline.states(shard, batch, ignore)
            session = model.session()
            states = window_states(session, shard.windows, batch, advance)
            columns = trace_columns(base, session, states, self.part, names)

        return work.rows.write(self.kind, self.id.key, columns)


def ignore(done: int) -> None:
    """Show no progress."""
    del done
