"""A session without a model: deterministic states by formula, for tests and for trying things in milliseconds.

The state after a token is a decayed sum of the embeddings of all tokens so far, squashed: it depends on every token of
the context and on their order, and what is kept of a prefix is that one running sum, so sharing a prefix is exact.
Sums run in fp64 a sequence at a time, so neither batching nor a prefix changes a bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qeval.backends.base import Backend, Prefix, SessionDefaults, Target
from qeval.errors import QevalError
from qeval.metrics.tokens import block_rows
from qeval.progress import Progress
from qeval.types import Request

_DECAY = 0.9
_SHARPNESS = 3.0
"""Scales the logits, so that choices differ by some nats and not by thousandths."""

_VARIANT_SEED = 1


@dataclass(frozen=True, eq=False)
class ReplayPrefix:
    """A prefix of `length` tokens, as its running sum [d_model] in fp64."""

    length: int
    total: Tensor


class ReplaySession(SessionDefaults):
    """A causal language model of a few formulas; its states are final hidden states, [d_model] fp32 each."""

    def __init__(self, vocab_size: int, *, d_model: int = 16, max_length: int = 1024, seed: int = 0) -> None:
        """Sessions of the same arguments answer alike, another `seed` answers differently."""
        self._max_length, self._vocab_size = max_length, vocab_size
        index = torch.arange(vocab_size * d_model, dtype=torch.float64).reshape(vocab_size, d_model)
        self._embedding = torch.sin((index + 1) * (1.7 + seed))
        self._head = (torch.cos((index + 1) * (2.3 + seed)) * _SHARPNESS).float()
        self.packs = True
        self.tokens_run = 0
        """Tokens that went through the model so far, prefixes counted once."""

    @property
    def max_length(self) -> int:
        """The longest sequence, prefix included."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return self._vocab_size

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        return block_rows(self.vocab_size)

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> ReplayPrefix:
        """Run a prefix once, after another if one is given."""
        before = self._cast_prefix(outer)
        return ReplayPrefix(len(tokens) + (before.length if before else 0), self._totals(tokens, before)[-1])

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the states at each request's positions, [positions, d_model] fp32.

        Raises:
            QevalError: a sequence is longer than `max_length`, or a token lies outside the vocabulary.
        """
        kept = self._cast_prefix(prefix)
        return [torch.tanh(self._totals(request.tokens, kept)[list(request.positions)]).float() for request in requests]

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        return states @ self._head.T

    @staticmethod
    def _cast_prefix(prefix: Prefix | None) -> ReplayPrefix | None:
        if prefix is not None and not isinstance(prefix, ReplayPrefix):
            raise TypeError("A prefix belongs to the session that made it.")
        return prefix

    def _totals(self, tokens: Sequence[int], prefix: ReplayPrefix | None) -> Tensor:
        """Return the running sum after each token, [tokens, d_model] fp64."""
        length = len(tokens) + (prefix.length if prefix else 0)
        if length > self._max_length:
            raise QevalError(f"A sequence of {length} tokens is longer than the context of {self._max_length}.")
        if not all(0 <= token < self._vocab_size for token in tokens):
            raise QevalError(f"A token lies outside the vocabulary of {self._vocab_size}.")
        self.tokens_run += len(tokens)
        total = prefix.total if prefix else torch.zeros(self._embedding.shape[1], dtype=torch.float64)
        totals = []
        for row in self._embedding[list(tokens)]:
            total = _DECAY * total + row
            totals.append(total)
        return torch.stack(totals)


class ReplayBackend(Backend[ReplaySession]):
    """Opens replay sessions; every variant answers alike, and otherwise than the baseline."""

    name = "replay"
    fake_quantizes = True
    warnings = ()

    def __init__(self, vocab_size: int, *, max_length: int = 1024) -> None:
        """The sessions' vocabulary and context."""
        self._vocab_size, self._max_length = vocab_size, max_length

    def identity(self, target: Target) -> dict[str, Any]:
        """Return the formula's name."""
        return {"backend": self.name}

    def prepare(self, progress: Progress) -> None:
        """Do nothing."""

    def describe(self, session: ReplaySession, target: Target) -> None:
        """Return None: nothing is to be said of a formula."""

    @contextmanager
    def open(self, target: Target) -> Iterator[ReplaySession]:
        """Open the baseline with None, or a variant."""
        seed = 0 if target is None else _VARIANT_SEED
        yield ReplaySession(self._vocab_size, max_length=self._max_length, seed=seed)
