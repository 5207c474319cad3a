"""Jobs of a model behind an endpoint, which gives log-probabilities of a few tokens in the place of states.

Perplexity, the true token's probability and the likeliest token are as exact as a session's. Of KL there is a lower
bound (`metrics/coarse.py`), in columns of its own: `kl_nats` stays null.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.metrics.coarse import kl_lower_bound
from qeval.metrics.tokens import Logits, block_rows
from qeval.progress import Advance
from qeval.score.choices import Score, by_question, item_columns
from qeval.score.corpus import state_positions, state_targets, token_columns
from qeval.score.jobs import CorpusJob, QuestionJob, Scorable, ignore
from qeval.store.schema import LOWER_BOUND_COLUMNS
from qeval.types import Call, Prediction, Request, TokenIds

LOWER_BOUND_VERSION = 1
"""Part of every key of such rows: raise it when the bound changes its meaning."""


class Predicts(Protocol):
    """An endpoint: what it reports of the next token after positions."""

    def next_predictions(self, prompts: Sequence[TokenIds]) -> Sequence[Prediction]:
        """Return the likeliest next tokens after each prompt, in order; empty where `predictions` alone has them."""
        ...

    def predictions(
        self, requests: Sequence[Request], advance: Advance, *, top: int | None = None
    ) -> Sequence[Sequence[Prediction]]:
        """Return log-probabilities (nats) by id after each position of each request, in order."""
        ...


class HasEndpoint(Scorable, Protocol):
    """A model behind an endpoint as its jobs see it."""

    @property
    def endpoint(self) -> Predicts:
        """The endpoint that is asked."""
        ...


@dataclass(frozen=True, eq=False)
class ServedCorpusJob(CorpusJob):
    """Token rows of one shard, from an endpoint."""

    model: HasEndpoint

    def identity(self) -> dict[str, Any]:
        """Return what a session's job does, and the version of the bound."""
        return {**CorpusJob.identity(self), "lower_bound": LOWER_BOUND_VERSION}

    def calls(self, session: Session) -> list[Call]:
        """Return none: no session is asked."""
        return []

    def run(self, advance: Advance) -> Path:
        """Score the shard against the baseline's states."""
        work, shard = self.work, self.shard
        names = {"variant": self.model.name, "backend": self.model.backend_name, "corpus": work.corpus}
        base = work.baseline.states(shard, work.batch_tokens, ignore)
        requests = [
            Request(tuple(window.tokens[: window.run_length + 1]), tuple(state_positions(window)))
            for window in shard.windows
        ]
        predictions = [each for found in self.model.endpoint.predictions(requests, advance) for each in found]
        values = compare_predictions(work.baseline.logits(), base, predictions, state_targets(shard.windows))
        return work.rows.write(self.kind, self.id.key, token_columns(shard, names, values))


@dataclass(frozen=True, eq=False)
class ServedQuestionJob(QuestionJob):
    """Item rows of some questions, from an endpoint."""

    model: HasEndpoint

    def calls(self, session: Session) -> list[Call]:
        """Return none: no session is asked."""
        return []

    def run(self, advance: Advance) -> Path:
        """Score every choice of every question."""
        pairs = [pair for question in self.questions for pair in question.pairs]
        scores = by_question(served_scores(self.model.endpoint, pairs, advance), self.questions)
        columns = item_columns(self.suite, self.questions, scores, self.model.name, self.model.backend_name)
        return self.work.rows.write(self.kind, self.id.key, columns)


def compare_predictions(
    base_logits: Logits, base_states: Tensor, predictions: Sequence[Prediction], targets: Tensor
) -> dict[str, Tensor]:
    """Return token columns by state: the target's, the likeliest token's, and the lower bound of KL.

    Args:
        base_logits: The baseline's head: states [rows, width] to logits [rows, vocabulary].
        base_states: The baseline's final hidden states, [n, width].
        predictions: What the endpoint reports at each of them.
        targets: The token id that follows each position, -1 where there is none, [n].
    """
    block = block_rows(base_logits(base_states[:1]).shape[-1], base_states.device)
    parts = [
        _compare_block(base_logits(base_states[rows]), predictions[rows], targets[rows])
        for rows in (slice(start, start + block) for start in range(0, len(predictions), block))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compare_block(logits: Tensor, predictions: Sequence[Prediction], targets: Tensor) -> dict[str, Tensor]:
    base = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    vocabulary = base.shape[-1]

    # ids beyond the baseline's are padding of the served head; both these and those that aren't known lie outside
    known = [{token: value for token, value in each.items() if 0 <= token < vocabulary} for each in predictions]
    width = max(map(len, known))
    ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in known])
    log_q = torch.tensor([[*each.values(), *[0.0] * (width - len(each))] for each in known], dtype=torch.float64)
    counts = torch.tensor([len(each) for each in known])
    filled = torch.arange(width) >= counts[:, None]

    bound = kl_lower_bound(_picked(base, ids).masked_fill(filled, float("-inf")), log_q, is_whole=counts == vocabulary)
    likeliest = torch.tensor([_likeliest(each) for each in predictions])
    agrees = (likeliest == base.argmax(-1).cpu()).double().masked_fill(likeliest < 0, float("nan"))
    own = [each[target] if target >= 0 else float("nan") for each, target in zip(known, targets.tolist(), strict=True)]
    log_p = torch.tensor(own, dtype=torch.float64)
    base_log_p = _picked(base, targets.clamp(min=0)[:, None])[:, 0]
    kl, outside = LOWER_BOUND_COLUMNS
    return {
        "log_p": log_p,
        "delta_p": log_p.exp() - base_log_p.exp(),
        "top1_agreement": agrees,
        kl: bound.kl_nats,
        outside: bound.mass_outside,
    }


def _picked(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return some log-probabilities of each row, fp64; picked where the rows lie, which are as wide as a vocabulary."""
    return log_probs.gather(1, ids.to(log_probs.device)).cpu().double()


def _likeliest(prediction: Prediction) -> int:
    """Return the likeliest token, the lowest id of equals as torch's argmax: logits in bf16 are often equal."""
    return max(prediction, key=lambda token: (prediction[token], -token))


def served_scores(endpoint: Predicts, pairs: Sequence[tuple[TokenIds, TokenIds]], advance: Advance) -> list[Score]:
    """Return the score of every continuation after its context, in order; equal pairs are asked once.

    Continuations of one token (letters) are read off the next token's distribution where they are among its likeliest:
    one short request for all choices of a question. All others are sent whole.
    """
    distinct = list(dict.fromkeys(pairs))
    contexts = list(dict.fromkeys(context for context, rest in distinct if len(rest) == 1))
    following = dict(zip(contexts, endpoint.next_predictions(contexts), strict=True))
    scores: dict[tuple[TokenIds, TokenIds], Score] = {}
    for context, rest in distinct:
        if len(rest) == 1 and rest[0] in (found := following[context]):
            scores[context, rest] = _score([found], rest)
            advance(len(context) + 1)

    left = [pair for pair in distinct if pair not in scores]
    requests = [
        Request((*context, *rest), tuple(range(len(context) - 1, len(context) + len(rest) - 1)))
        for context, rest in left
    ]
    for pair, found_after in zip(left, endpoint.predictions(requests, advance, top=1), strict=True):
        scores[pair] = _score(found_after, pair[1])
    return [scores[pair] for pair in pairs]


def _score(predictions: Sequence[Prediction], rest: TokenIds) -> Score:
    """Return the summed log-likelihood (nats) of a continuation, and whether each token is the likeliest."""
    total = sum(each[token] for each, token in zip(predictions, rest, strict=True))
    greedy = all(_likeliest(each) == token for each, token in zip(predictions, rest, strict=True))
    return total, greedy
