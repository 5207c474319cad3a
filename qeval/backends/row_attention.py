"""Attention of sequences that lie one behind the other in a row and all continue one prefix: the way of GPUs.

FlexAttention compiles a function of two positions into one kernel and skips the blocks of the mask that are empty, so
the work is that of each sequence alone, no key of the prefix is copied for each of them, and nothing is filled up.
Sliding windows are part of the mask, a soft cap is part of the score. What lengths, prefix and window are is data of
the kernel: it is compiled once for a model's kinds of layers, not for each batch (Dong et al., arXiv 2412.05496).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128
"""Positions of a side of the mask's blocks; FlexAttention's own default."""
_MOST_GRAPHS = 64
"""Kernels that dynamo keeps: a kind of layer, a type and a head size each takes one. Beyond it, it fails."""

Kernel = Callable[..., Any]
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class RowLayout:
    """Sequences of so many tokens each, one behind the other; the masks of the layers that see them."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """No mask is made before a layer asks for it."""
        self._lengths = torch.tensor(lengths)
        self._device = device
        self._masks: dict[tuple[int, int | None], BlockMask] = {}

    def mask(self, prefix: int, window: int | None) -> BlockMask:
        """Return which keys a query sees: of the prefix and of its own sequence, those before it within the window.

        Args:
            prefix: Tokens of the prefix, whose keys come before the row's.
            window: The number of positions that a layer sees, a query's own counted; None for all.
        """
        if (prefix, window) not in self._masks:
            self._masks[prefix, window] = self._build_mask(prefix, window)
        return self._masks[prefix, window]

    def _build_mask(self, prefix: int, window: int | None) -> BlockMask:
        tokens = int(self._lengths.sum())
        starts = torch.repeat_interleave(self._lengths.cumsum(0) - self._lengths, self._lengths)
        seen, whole = _blocks(starts, prefix, window)

        # Plain numbers would be compiled into the kernel, 0-dim tensors are its data.
        def scalar(value: int) -> Tensor:
            return torch.tensor(value, dtype=torch.int32, device=self._device)

        width = None if window is None else scalar(window)
        sees = _sees(starts.to(self._device, torch.int32), scalar(prefix), width)

        count, columns = _ordered(seen & ~whole, self._device)
        full_count, full_columns = _ordered(whole, self._device)
        sizes = (tokens, prefix + tokens)
        return BlockMask.from_kv_blocks(count, columns, full_count, full_columns, _BLOCK, sees, sizes)


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowLayout,
    prefix: tuple[Tensor, Tensor] | None,
    *,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """Return the attention [1, heads, tokens, size] of a row's queries to their own sequences and the prefix.

    Args:
        query: [1, heads, tokens, size]; key and value may have fewer heads.
        key: [1, key heads, tokens, size].
        value: [1, key heads, tokens, value size].
        row: How the tokens divide into sequences.
        prefix: Keys and values [1, key heads, prefix tokens, size] of what all sequences continue.
        scale: What products are multiplied by; None for the root of the head size.
        window: As `RowLayout.mask` takes it.
        soft_cap: The bound of scores, by a tanh; None for none.
    """
    # A rotary embedding in fp32 leaves keys wider than values; attention rounds to the values' type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    length = 0
    if prefix is not None:
        length = prefix[0].shape[-2]
        key, value = torch.cat([prefix[0].to(key.dtype), key], dim=-2), torch.cat([prefix[1], value], dim=-2)
    with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
        found: Tensor = _kernel()(
            query,
            key,
            value,
            score_mod=None if soft_cap is None else _capped(soft_cap, query.device),
            block_mask=row.mask(length, window),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )
    return found


@cache
def _kernel() -> Kernel:
    # Sizes stay open, and one kind of kernel serves short and long rows: it is tried on a short one when a model loads.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def _capped(cap: float, device: torch.device) -> Callable[..., Tensor]:
    """Return the score function of a soft cap; always the same one, so that it is compiled once."""
    bound = torch.tensor(cap, dtype=torch.float32, device=device)  # a plain number would be read on the host

    def score(products: Tensor, *_: Tensor) -> Tensor:
        return bound * torch.tanh(products / bound)

    return score


def _sees(starts: Tensor, prefix: Tensor, window: Tensor | None) -> MaskFunction:
    """Return the mask as a function of a query's and a key's index; `starts` [tokens]: where each sequence begins."""

    def own(query: Tensor, key: Tensor) -> Tensor:
        place = key - prefix
        return (place < 0) | ((place >= starts[query]) & (place <= query))

    if window is None:
        return lambda batch, head, query, key: own(query, key)

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Positions are counted from the prefix's first token: keys of the row stand where their sequence puts them.
        shift = prefix - starts[query]
        position = torch.where(key < prefix, key, key - prefix + shift)
        return own(query, key) & (query + shift - position < window)

    return within


def _blocks(starts: Tensor, prefix: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Return which blocks of the mask [query blocks, key blocks] hold anything, and which of them are full."""
    tokens = len(starts)
    first = torch.arange(0, tokens, _BLOCK)
    last = (first + _BLOCK - 1).clamp(max=tokens - 1)
    begin = torch.arange(0, prefix + tokens, _BLOCK)
    end = begin + _BLOCK - 1

    # Of its own sequences a block of queries sees what lies between the first one's start and its last query.
    low = starts[first]
    reach = torch.zeros_like(first)
    if window is not None:
        low = torch.maximum(low, first - window + 1)
        # Of the prefix it sees what the query nearest to its sequence's start does.
        offsets = torch.arange(tokens) - starts
        filled = torch.nn.functional.pad(offsets, (0, len(first) * _BLOCK - tokens), value=tokens)
        reach = (prefix - window + 1 + filled.view(-1, _BLOCK).amin(1)).clamp(min=0)
    of_prefix = (begin < prefix) & (end >= reach[:, None])
    of_row = (end >= (prefix + low)[:, None]) & (begin <= (prefix + last)[:, None])
    full = of_prefix & (end < prefix) if window is None else torch.zeros_like(of_prefix)
    return of_prefix | of_row, full


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row hold anything, and the columns with those first, as FlexAttention wants."""
    count = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None].to(device), columns[None, None].to(device)
