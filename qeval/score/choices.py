"""Log-likelihoods of every choice of a question, prefixes shared, only scored positions through the head."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.backends.memory import with_fitting_blocks
from qeval.errors import QevalError
from qeval.progress import Advance
from qeval.score.prefix import prefix_tree, tokens_run
from qeval.score.schedule import Prefixes, schedule
from qeval.store.schema import constant_column
from qeval.tasks.harness import Question, Suite
from qeval.types import Call, Request, TokenIds

QUESTIONS_VERSION = 1
"""Part of every key: raise it when a question's score changes its meaning."""

_Pair = tuple[TokenIds, TokenIds]
Score = tuple[float, bool]
"""The summed log-likelihood (nats) of a continuation, and whether it is what the model would say greedily."""


class RankedAnswer(NamedTuple):
    """The summed log-likelihood (nats) of a continuation, and the largest rank of its tokens (1: the likeliest)."""

    log_p: float
    rank: int


@dataclass(frozen=True)
class _Sequence:
    """Token ids that are run once, and the continuations read off them: (first position, ids, where it goes)."""

    tokens: TokenIds
    continuations: tuple[tuple[int, TokenIds, int], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Every position whose prediction is read."""
        return tuple(sorted({start + i for start, ids, _ in self.continuations for i in range(len(ids))}))

    @property
    def request(self) -> Request:
        """The whole of it."""
        return Request(self.tokens, self.positions)


def count_pair_tokens(pairs: Sequence[tuple[TokenIds, TokenIds]]) -> int:
    """Return the tokens of the distinct sequences of some (context, continuation) pairs, before prefixes are shared."""
    return sum(len(sequence.tokens) for sequence in _sequences(pairs))


def shared_tokens(questions: Sequence[Question]) -> int:
    """Return the tokens that are run for some questions when their prefixes are shared."""
    return shared_pair_tokens([pair for question in questions for pair in question.pairs])


def shared_pair_tokens(pairs: Sequence[_Pair]) -> int:
    """Return the tokens that are run for some (context, continuation) pairs when their prefixes are shared."""
    sequences = _sequences(pairs)
    tree = prefix_tree([s.tokens for s in sequences], [s.positions[0] for s in sequences])
    return tokens_run(tree, [len(sequence.tokens) for sequence in sequences])


def question_calls(questions: Sequence[Question], batch_tokens: int, *, packs: bool) -> list[Call]:
    """Return what `score_questions` will ask a session for, in order; `packs`: the session's."""
    return pair_calls([pair for question in questions for pair in question.pairs], batch_tokens, packs=packs)


def pair_calls(pairs: Sequence[_Pair], batch_tokens: int, *, packs: bool) -> list[Call]:
    """Return what `score_pairs` will ask a session for, in order; `packs`: the session's."""
    sequences = _sequences(pairs)
    return [batch.call for batch in schedule([s.request for s in sequences], batch_tokens, packs=packs)]


_Look = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns a whole number [n] of log-probabilities [rows, vocabulary], for places of rows [n] and tokens in them [n]."""
_Made = TypeVar("_Made")


def _read_pairs(
    session: Session,
    pairs: Sequence[_Pair],
    batch_tokens: int,
    advance: Advance,
    *,
    look: _Look,
    make: Callable[[Tensor, Tensor], _Made],
) -> list[_Made]:
    """Return what `make` makes of every continuation after its context, in order.

    It is given the log-probability (fp64) of each token of the continuation, and what `look` says of it. `advance` is
    told the tokens that are done, `count_pair_tokens(pairs)` in all. Log-probabilities do not depend on `batch_tokens`
    (within 1e-4 nats in fp32).

    Raises:
        QevalError: the model's logits are not finite.
    """
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(pairs)
    sequences = _sequences(pairs)
    prefixes = Prefixes(session)
    for batch in schedule([s.request for s in sequences], batch_tokens, packs=session.packs):
        batch_sequences = [sequences[member] for member in batch.members]
        states = session.states(batch.call.requests, prefixes.at(batch.call.path))
        _read_batch(session, batch_sequences, torch.cat(states), found, look)
        advance(sum(len(sequence.tokens) for sequence in batch_sequences))
    return [make(*each) for each in found if each is not None]


def _is_largest(log_probs: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.argmax(-1)[rows] == tokens


def _score(log_p: Tensor, largest: Tensor) -> Score:
    return float(log_p.sum()), bool(largest.all())


def _ranks(log_probs: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return 1 for the likeliest token, 2 for the next; of equals the first counts as likelier, as argmax has it."""
    of_rows, tokens = log_probs[rows], tokens.unsqueeze(-1)
    own, places = of_rows.gather(-1, tokens), torch.arange(of_rows.shape[-1], device=tokens.device)
    return 1 + ((of_rows > own) | ((of_rows == own) & (places < tokens))).sum(-1)


def _ranked_answer(log_p: Tensor, ranks: Tensor) -> RankedAnswer:
    return RankedAnswer(float(log_p.sum()), int(ranks.max()))


score_pairs = partial(_read_pairs, look=_is_largest, make=_score)
"""Scores of continuations: their log-likelihood, and whether each is said greedily."""
rank_pairs = partial(_read_pairs, look=_ranks, make=_ranked_answer)
"""Answers with their rank: the log-likelihood of continuations, and the largest rank of their tokens."""


def score_questions(
    session: Session, questions: Sequence[Question], batch_tokens: int, advance: Advance
) -> list[list[Score]]:
    """Return the scores of every pair of every question."""
    scores = score_pairs(session, [pair for q in questions for pair in q.pairs], batch_tokens, advance)
    return by_question(scores, questions)


def by_question(scores: Iterable[Score], questions: Sequence[Question]) -> list[list[Score]]:
    """Return the scores of all questions' pairs, which are in order, as a list a question."""
    left = iter(scores)
    return [[next(left) for _ in question.pairs] for question in questions]


def question_tokens(questions: Sequence[Question]) -> int:
    """Return the tokens of the distinct sequences of some questions, before prefixes are shared."""
    return count_pair_tokens([pair for question in questions for pair in question.pairs])


def item_columns(
    suite: Suite, questions: Sequence[Question], scores: Sequence[Sequence[Score]], variant: str, backend: str
) -> dict[str, Any]:
    """Return the item rows of some questions of a suite."""
    judged = [suite.judge(question, row) for question, row in zip(questions, scores, strict=True)]
    values = [[score for score, _ in row[: q.choices]] for q, row in zip(questions, scores, strict=True)]
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
    """Return the sha256 of a question's token ids, contexts and continuations."""
    sha = hashlib.sha256()
    for part in (ids for pair in question.pairs for ids in pair):
        sha.update(array("q", (len(part), *part)).tobytes())
    return sha.hexdigest()


def _sequences(pairs: Sequence[tuple[TokenIds, TokenIds]]) -> list[_Sequence]:
    """Return the distinct sequences to run: a continuation's last token is predicted, never fed."""
    continuations: dict[TokenIds, list[tuple[int, TokenIds, int]]] = {}
    for index, (context, rest) in enumerate(pairs):
        continuations.setdefault((*context, *rest[:-1]), []).append((len(context) - 1, rest, index))
    return [_Sequence(tokens, tuple(entries)) for tokens, entries in continuations.items()]


def _read_batch(
    session: Session,
    batch: Sequence[_Sequence],
    states: Tensor,
    found: list[tuple[Tensor, Tensor] | None],
    look: _Look,
) -> None:
    """Read with one head product for the batch, not one a sequence: `states` [positions of all sequences, width]."""
    wanted: list[tuple[int, int]] = []
    parts: list[tuple[int, slice]] = []
    first = 0
    for sequence in batch:
        rows = {position: first + row for row, position in enumerate(sequence.positions)}
        first += len(rows)
        for start, ids, index in sequence.continuations:
            parts.append((index, slice(len(wanted), len(wanted) + len(ids))))
            wanted += [(rows[start + i], token) for i, token in enumerate(ids)]
    log_p, seen = with_fitting_blocks(session, partial(_read, session, states, wanted, look))
    for index, part in parts:
        found[index] = (log_p[part], seen[part])


def _read(
    session: Session, states: Tensor, wanted: Sequence[tuple[int, int]], look: _Look, block: int
) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities of the wanted (row of states, token), and what `look` says of each."""
    rows, tokens = (torch.tensor(list(part)) for part in zip(*wanted, strict=True))
    log_p = torch.empty(len(wanted), dtype=torch.float64)
    seen = torch.empty(len(wanted), dtype=torch.int64)
    for start in range(0, len(states), block):
        log_probs = torch.log_softmax(session.logits(states[start : start + block]), dim=-1, dtype=torch.float32)
        here = (rows >= start) & (rows < start + block)
        # Picked on the device: a row of logits is as wide as the vocabulary, and two numbers of it are wanted.
        row, token = (rows[here] - start).to(log_probs.device), tokens[here].to(log_probs.device)
        log_p[here] = log_probs[row, token].cpu().double()
        seen[here] = look(log_probs, row, token).cpu().long()
    if not bool(torch.isfinite(log_p).all()):
        raise QevalError("The model's logits are not finite; its weights are broken or its compute type overflows.")
    return log_p, seen
