"""Rules that pick the next token of a generation: the likeliest, or one that is drawn at a temperature."""

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
        races = torch.empty_like(log_p)
        for row, prompt in enumerate(prompts):
            seed = (self.seeds[prompt] * _STRIDE + step) % _SEEDS
            races[row].exponential_(generator=torch.Generator().manual_seed(seed))
        return (log_p - races.log()).argmax(dim=-1).to(logits.device)
