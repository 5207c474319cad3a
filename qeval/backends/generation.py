"""Generate tokens after prompts of any lengths in one batch, with keys and values kept.

Shorter prompts are padded on the left, behind a mask. Not every architecture honours it, so a batch is padded only
where a trial gave the state of the same prompt without padding; elsewhere prompts of one length make a batch. What all
prompts of a batch begin with is run once, and a prompt whose answer has ended leaves the batch.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qeval.backends.decoding import Decoding
from qeval.backends.prefix import can_select, can_spread, growing_cache, spread_cache
from qeval.backends.sharing import differs
from qeval.models.structure.forward import FinalStates
from qeval.types import TokenIds

_MASK, _PLACES = "attention_mask", "position_ids"
_PADDING = 0
"""The id that stands where the mask hides it."""
_SHORTEST_PREFIX = 16
"""Tokens that prompts must have in common for them to be run once."""

IsDone = Callable[[Sequence[int]], bool]
"""A test of whether an answer ends with the tokens that were generated so far."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A model that generates.

    Attributes:
        model: A transformers causal language model in eval mode.
        logits: Its head: final states [rows, d_model] to logits [rows, vocab].
        keeps: Whether keys and values are kept; without, every step runs all tokens again.
        change_cache: Makes the cache of a pass that keeps nothing, for what rounds keys and values; None for none.
        rope_limit: The length beyond which a sequence is turned by other rotary frequencies; no batch crosses it.
    """

    model: Any
    logits: Callable[[Tensor], Tensor]
    keeps: bool
    change_cache: Callable[[], Any] | None = None
    rope_limit: float = math.inf

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[TokenIds],
        count: int,
        decoding: Decoding,
        stops: Collection[int] = (),
        is_done: IsDone | None = None,
    ) -> list[TokenIds]:
        """Return what each prompt goes on with: up to `count` tokens, the first of `stops` among them the last.

        Args:
            prompts: Token ids.
            count: The most tokens that one is continued by.
            decoding: What picks the next token.
            stops: Ids that end a continuation.
            is_done: Says of the tokens so far whether they end it; without, only `stops` do.
        """
        ends = frozenset(stops)

        def has_ended(tokens: Sequence[int]) -> bool:
            return tokens[-1] in ends or (is_done is not None and is_done(tokens))

        found: dict[int, TokenIds] = {}
        for rows in self._batches(prompts):
            found.update(self._run({row: prompts[row] for row in rows}, count, decoding, has_ended))
        return [found[row] for row in range(len(prompts))]

    def _batches(self, prompts: Sequence[TokenIds]) -> Iterator[list[int]]:
        """Yield the prompts of each batch by index: all on one side of the rotary limit where they may be padded."""
        for is_long in (False, True):
            side = [row for row, prompt in enumerate(prompts) if (len(prompt) > self.rope_limit) == is_long]
            lengths = sorted({len(prompts[row]) for row in side})
            if len(lengths) > 1 and self._padding_holds(min((prompts[row] for row in side), key=len), lengths[-1]):
                yield side
                continue
            for length in lengths:
                yield [row for row in side if len(prompts[row]) == length]

    def _run(
        self, prompts: Mapping[int, TokenIds], count: int, decoding: Decoding, has_ended: IsDone
    ) -> dict[int, TokenIds]:
        """Return what the prompts of one batch go on with, by their index."""
        longest = max(map(len, prompts.values()))
        ids = torch.tensor([[*[_PADDING] * (longest - len(p)), *p] for p in prompts.values()], device=self._device)
        padding = torch.tensor([longest - len(prompt) for prompt in prompts.values()], device=self._device)
        lacking = padding if bool(padding.any()) else None
        cache, skip = self._begin(list(prompts.values()), padding, count)
        said: dict[int, list[int]] = {row: [] for row in prompts}
        rows, ended, fed = list(prompts), set[int](), ids[:, skip:]
        for step in range(count):
            logits = self.logits(self._forward(fed, ids.shape[1], lacking, cache)[:, -1])
            chosen = decoding.pick(logits, rows, step).to(self._device)  # the head may lie on another GPU
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row in ended:
                    continue  # it stays where the cache can't let it go
                said[row].append(token)
                if has_ended(said[row]):
                    ended.add(row)
            going = [place for place, row in enumerate(rows) if row not in ended]
            if not going:
                break

            ids = torch.cat([ids, chosen[:, None]], dim=1)
            if len(going) < len(rows) and (cache is None or can_select(cache)):
                places = torch.tensor(going, device=self._device)
                rows, ids, chosen = [rows[place] for place in going], ids[places], chosen[places]
                lacking = None if lacking is None else lacking[places]
                if cache is not None:
                    cache.batch_select_indices(places)
            fed = ids if cache is None else chosen[:, None]
        return {row: tuple(tokens) for row, tokens in said.items()}

    def _begin(self, prompts: Sequence[TokenIds], padding: Tensor, count: int) -> tuple[Any, int]:
        """Return the cache of a batch, and the columns that it holds already: those of what all prompts begin with.

        Rows are padded on the left, so that each holds as much less of the beginning as it has padding: the rest of it
        is run with the row's own tokens. Layers that keep more than keys and values begin empty, and so does a batch
        that crosses a rotary limit.
        """
        cache = growing_cache(self.model) if self.keeps else None
        shared = _shared_tokens(prompts)
        is_short = max(map(len, prompts)) + count <= self.rope_limit
        if cache is None or len(prompts) < 2 or shared < _SHORTEST_PREFIX or not (is_short and can_spread(cache)):
            return cache, 0
        self._final_states(torch.tensor([prompts[0][:shared]], device=self._device), cache)
        spread_cache(cache, padding)
        return cache, shared

    def _forward(self, fed: Tensor, total: int, lacking: Tensor | None, cache: Any) -> Tensor:
        """Return the final states [rows, fed tokens, d_model] of the last of `total` tokens a row.

        `lacking` says how many tokens of each row are padding, [rows]; None where none is.
        """
        places: dict[str, Tensor] = {}
        if lacking is not None:
            column = torch.arange(total, device=self._device)[None, :]
            places[_MASK] = (column >= lacking[:, None]).long()
            if _PLACES in self._parameters:
                places[_PLACES] = (column - lacking[:, None]).clamp(min=0)[:, total - fed.shape[1] :]
        if cache is None and self.change_cache is not None:
            cache = self.change_cache()
        return self._final_states(fed, cache, **places)

    def _padding_holds(self, prompt: TokenIds, length: int) -> bool:
        """Return whether a prompt that is padded to a length, and a step after it, gives its states without padding."""
        if _MASK not in self._parameters:
            return False
        lacking = torch.tensor([length - len(prompt)], device=self._device)
        padded = torch.tensor([[*[_PADDING] * (length - len(prompt)), *prompt]], device=self._device)
        whole = torch.tensor([[*prompt, prompt[-1]]], device=self._device)
        expected = self._forward(whole, whole.shape[1], None, None)[0, -2:]

        cache = growing_cache(self.model) if self.keeps else None
        first = self._forward(padded, length, lacking, cache)[0, -1:]
        longer = torch.cat([padded, padded[:, -1:]], dim=1)
        fed = longer if cache is None else longer[:, -1:]
        second = self._forward(fed, length + 1, lacking, cache)[0, -1:]
        return (
            differs([torch.cat([first, second])], [expected], self.model.get_output_embeddings().weight.dtype) is None
        )

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def _parameters(self) -> Collection[str]:
        return self._final_states.parameters

    @cached_property
    def _final_states(self) -> FinalStates:
        return FinalStates(self.model)


def _shared_tokens(prompts: Sequence[TokenIds]) -> int:
    """Return how many tokens all prompts begin with; the last of each is its own.

    >>> _shared_tokens([(1, 2, 3, 4), (1, 2, 5)]), _shared_tokens([(1, 2), (1, 2)])
    (2, 1)
    """
    first, last = min(prompts), max(prompts)  # those in between begin with what these two share
    apart = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(apart, min(map(len, prompts)) - 1)
