"""Log-likelihoods of every choice of a question, prefixes shared, only scored positions through the head."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.errors import QevalError
from qeval.progress import Advance
from qeval.score.prefix import prefix_tree, tokens_run
from qeval.score.schedule import Prefixes, schedule
from qeval.store.schema import constant_column
from qeval.tasks.harness import Ids, Question, Suite
from qeval.types import Call, Request

QUESTIONS_VERSION = 1
"""Part of every key: raise it when a question's score changes its meaning."""

Score = tuple[float, bool]
"""The summed log-likelihood (nats) of a continuation, and whether it is what the model would say greedily."""


@dataclass(frozen=True)
class _Sequence:
    """Token ids that are run once, and the continuations read off them: (first position, ids, where it goes)."""

    tokens: Ids
    asked: tuple[tuple[int, Ids, int], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Every position whose prediction is read."""
        return tuple(sorted({start + i for start, ids, _ in self.asked for i in range(len(ids))}))

    @property
    def request(self) -> Request:
        """The whole of it."""
        return Request(self.tokens, self.positions)


def pair_tokens(pairs: Sequence[tuple[Ids, Ids]]) -> int:
    """Tokens of the distinct sequences of some (context, continuation) pairs, before prefixes are shared."""
    return sum(len(sequence.tokens) for sequence in _sequences(pairs))


def shared_tokens(questions: Sequence[Question]) -> int:
    """Tokens that are run for some questions when their prefixes are shared."""
    sequences = _sequences([pair for question in questions for pair in question.pairs])
    tree = prefix_tree([s.tokens for s in sequences], [s.positions[0] for s in sequences])
    return tokens_run(tree, [len(sequence.tokens) for sequence in sequences])


def question_calls(questions: Sequence[Question], batch_tokens: int, *, packs: bool) -> list[Call]:
    """What `score_questions` will ask a session for, in order; `packs`: the session's."""
    sequences = _sequences([pair for question in questions for pair in question.pairs])
    return [batch.call for batch in schedule([s.request for s in sequences], batch_tokens, packs=packs)]


def score_pairs(session: Session, pairs: Sequence[tuple[Ids, Ids]], batch_tokens: int, advance: Advance) -> list[Score]:
    """The score of every continuation after its context, in order.

    `advance` is told the tokens that are done, `pair_tokens(pairs)` in all. Scores do not depend on
    `batch_tokens` (within 1e-4 nats in fp32).

    Raises:
        QevalError: the model's logits are not finite.
    """
    scores: list[Score | None] = [None] * len(pairs)
    sequences = _sequences(pairs)
    prefixes = Prefixes(session)
    for batch in schedule([s.request for s in sequences], batch_tokens, packs=session.packs):
        asked = [sequences[member] for member in batch.members]
        states = session.states(batch.call.requests, prefixes.at(batch.call.path))
        _score_batch(session, asked, torch.cat(states), scores)
        advance(sum(len(sequence.tokens) for sequence in asked))
    return [score for score in scores if score is not None]


def score_questions(
    session: Session, questions: Sequence[Question], batch_tokens: int, advance: Advance
) -> list[list[Score]]:
    """The scores of every pair of every question."""
    scores = iter(score_pairs(session, [pair for q in questions for pair in q.pairs], batch_tokens, advance))
    return [[next(scores) for _ in question.pairs] for question in questions]


def question_tokens(questions: Sequence[Question]) -> int:
    """Tokens of the distinct sequences of some questions, before prefixes are shared."""
    return pair_tokens([pair for question in questions for pair in question.pairs])


def item_columns(
    suite: Suite, questions: Sequence[Question], scores: Sequence[Sequence[Score]], variant: str, backend: str
) -> dict[str, Any]:
    """The item rows of some questions of a suite."""
    judged = [suite.judge(question, found) for question, found in zip(questions, scores, strict=True)]
    values = [[score for score, _ in found[: q.choices]] for q, found in zip(questions, scores, strict=True)]
    return {
        "variant": constant_column(variant, len(questions)),
        "backend": constant_column(backend, len(questions)),
        "task": [suite.info.name] * len(questions),
        "subject": [question.subject for question in questions],
        "item": [question.item for question in questions],
        "gold": [question.gold for question in questions],
        "pred": [int(np.argmax(row)) for row in values],
        "choice_loglikelihoods": values,
        "acc": [metrics.get("acc") for metrics in judged],
        "acc_norm": [metrics.get("acc_norm") for metrics in judged],
        "shots": [question.shots for question in questions],
        "prompt_tokens": [len(question.prompt) for question in questions],
        "prompt_sha256": [prompt_sha256(question) for question in questions],
    }


def prompt_sha256(question: Question) -> str:
    """The sha256 of a question's token ids, contexts and continuations."""
    sha = hashlib.sha256()
    for part in (ids for pair in question.pairs for ids in pair):
        sha.update(array("q", (len(part), *part)).tobytes())
    return sha.hexdigest()


def _sequences(pairs: Sequence[tuple[Ids, Ids]]) -> list[_Sequence]:
    """The distinct sequences to run: a continuation's last token is predicted, never fed."""
    asked: dict[Ids, list[tuple[int, Ids, int]]] = {}
    for index, (context, rest) in enumerate(pairs):
        asked.setdefault((*context, *rest[:-1]), []).append((len(context) - 1, rest, index))
    return [_Sequence(tokens, tuple(entries)) for tokens, entries in asked.items()]


def _score_batch(session: Session, batch: Sequence[_Sequence], states: Tensor, scores: list[Score | None]) -> None:
    """One head product for the batch, not one a sequence: `states` [positions of all sequences, width]."""
    wanted: list[tuple[int, int]] = []
    parts: list[tuple[int, slice]] = []
    first = 0
    for sequence in batch:
        rows = {position: first + row for row, position in enumerate(sequence.positions)}
        first += len(rows)
        for start, ids, index in sequence.asked:
            parts.append((index, slice(len(wanted), len(wanted) + len(ids))))
            wanted += [(rows[start + i], token) for i, token in enumerate(ids)]
    log_p, greedy = _read(session, states, wanted)
    for index, part in parts:
        scores[index] = (float(log_p[part].sum()), bool(greedy[part].all()))


def _read(session: Session, states: Tensor, wanted: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities of the wanted (row of states, token), and whether each is its row's largest."""
    rows, tokens = (torch.tensor(list(part)) for part in zip(*wanted, strict=True))
    block = session.block_rows
    log_p = torch.empty(len(wanted), dtype=torch.float64)
    greedy = torch.empty(len(wanted), dtype=torch.bool)
    for start in range(0, len(states), block):
        found = torch.log_softmax(session.logits(states[start : start + block]), dim=-1, dtype=torch.float32).cpu()
        here = (rows >= start) & (rows < start + block)
        log_p[here] = found[rows[here] - start, tokens[here]].double()
        greedy[here] = found.argmax(-1)[rows[here] - start] == tokens[here]
    if not bool(torch.isfinite(log_p).all()):
        raise QevalError("The model's logits are not finite; its weights are broken or its compute type overflows.")
    return log_p, greedy
