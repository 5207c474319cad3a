"""Rules that pick the next token of a generation: the likeliest, or one that is drawn at a temperature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Choice(Protocol):
    """The rule that picks the next token of each prompt of a generation."""

    def rows(self, prompts: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Return what picks the next tokens, [rows], from logits [rows, vocab], for the prompts of a batch by index.

        It is called once a step, in order.
        """
        ...


@dataclass(frozen=True)
class Likeliest:
    """Greedy decoding: the most likely token, the first of equals."""

    def rows(self, prompts: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Return the argmax."""
        del prompts
        return lambda logits: logits.argmax(dim=-1)


@dataclass(frozen=True)
class Sampled:
    """Sampling at a temperature, each prompt from a seed of its own, so that no batch changes what is drawn."""

    temperature: float
    seeds: tuple[int, ...]

    def rows(self, prompts: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Return what draws by the exponential race: the token with the largest p / e, e standard exponential."""
        generators = [torch.Generator().manual_seed(self.seeds[prompt]) for prompt in prompts]

        def draw(logits: Tensor) -> Tensor:
            scaled = torch.log_softmax(logits.float().cpu() / self.temperature, dim=-1)
            races = [torch.empty(logits.shape[-1]).exponential_(generator=each) for each in generators]
            return (scaled - torch.stack(races).log()).argmax(dim=-1).to(logits.device)

        return draw
