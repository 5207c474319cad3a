"""Rules that pick the next token of a generation: the likeliest, one drawn at a temperature, or one in a grammar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_SEEDS = 2**63
_STRIDE = 1_000_003
"""A prime, so that the steps of one prompt do not meet those of the next seed."""


class Decoding(Protocol):
    """The rule that picks the next token of each prompt of a generation."""

    def pick(self, logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        """Return the next tokens, [rows].

        Args:
            logits: Those of the next token, [rows, vocab].
            prompts: Which prompt of the generation each row is of, by index.
            step: How many tokens were picked before.
        """
        ...


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding: the most likely token, the first of equals."""

    def pick(self, logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        """Return the argmax of each row."""
        del prompts, step
        return logits.argmax(dim=-1)


@dataclass(frozen=True)
class Sampling:
    """Sampling at a temperature, each prompt from a seed of its own, so that no batch changes what is drawn."""

    temperature: float
    seeds: tuple[int, ...]

    def pick(self, logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        """Draw by the exponential race: the token with the largest p / e, e standard exponential."""
        log_p = torch.log_softmax(logits.float().cpu() / self.temperature, dim=-1)
        return self.draw(log_p, prompts, step).to(logits.device)

    def draw(self, log_p: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        """Return a token of each row of log-probabilities [rows, vocab], which need not sum to one, [rows].

        Args:
            log_p: On the CPU.
            prompts: Which prompt of the generation each row is of, by index.
            step: How many tokens were picked before.
        """
        races = torch.empty_like(log_p)
        for row, prompt in enumerate(prompts):
            seed = (self.seeds[prompt] * _STRIDE + step) % _SEEDS
            races[row].exponential_(generator=torch.Generator().manual_seed(seed))
        return (log_p - races.log()).argmax(dim=-1)


class Matcher(Protocol):
    """A grammar and how far a text has come in it."""

    @property
    def is_complete(self) -> bool:
        """Return whether the text is all that the grammar asks for."""
        ...

    def allowed(self) -> Tensor:
        """Return which tokens may follow, bool [tokens]."""
        ...

    def take(self, token: int) -> None:
        """Put a token behind the text."""
        ...


@dataclass(frozen=True, eq=False)
class Constrained:
    """Sampling among the tokens that a grammar allows, at temperature 1.

    So a text is drawn with the product of p(token) / p(any allowed token). `end` follows a complete text, and one that
    nothing may follow.
    """

    sampling: Sampling
    matchers: tuple[Matcher, ...]
    end: int

    def pick(self, logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        """Draw among the allowed tokens of each row, as `Sampling` does."""
        log_p = torch.log_softmax(logits.float().cpu(), dim=-1)
        over = []
        for row, prompt in enumerate(prompts):
            allowed = self.matchers[prompt].allowed()[: log_p.shape[-1]]
            log_p[row, : len(allowed)].masked_fill_(~allowed, -torch.inf)
            log_p[row, len(allowed) :] = -torch.inf
            over.append(self.matchers[prompt].is_complete or not bool(allowed.any()))
        drawn = self.sampling.draw(log_p, prompts, step)
        for row, prompt in enumerate(prompts):
            if over[row]:
                drawn[row] = self.end
            else:
                self.matchers[prompt].take(int(drawn[row]))
        return drawn.to(logits.device)
