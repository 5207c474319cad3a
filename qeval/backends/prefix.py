"""The state that a prefix leaves in a transformers cache: computed once, for any number of continuations.

Keys and values are lent: continuations attend to them and leave them as they are. A running state (Mamba, GatedDeltaNet
and other linear attention, short convolutions) is changed by every token, so each continuation gets a copy of what it
was at the prefix's end; so does whatever else a layer keeps: the keys of a sparse attention's indexer, compressed keys.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from qeval.backends.shared import Lent, tagged
from qeval.models.structure.kv_cache import KvChange
from qeval.models.structure.trace import language_config

_MORE_TOKENS = 64
"""Tokens that a layer makes room for at a time."""


class PrefixLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of a prefix, lent to any number of continuations and never grown by them.

    The first tokens that it sees are the prefix's own; a prefix that continues another starts from the outer one's.
    """

    is_sliding = False

    def __init__(
        self, outer: "PrefixLayer | None" = None, *, apart: bool = False, change: KvChange | None = None
    ) -> None:
        """Begin with what the prefix continues.

        Args:
            outer: This layer of the prefix that is continued.
            apart: Whether continuations attend to it by `shared`.
            change: What rounds new keys and values, the prefix's and those of continuations, before they are kept.
        """
        super().__init__()
        self._outer, self._apart, self._change = outer, apart, change

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep the prefix: keys and values of shape [1, heads, tokens, head size]."""
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        self._outer = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values that attention sees: the prefix's, or the prefix before each continuation's."""
        if self._change is not None:
            key_states, value_states = self._change(key_states, value_states)
        if self.is_initialized and self._apart:
            return tagged(key_states, Lent(self.keys, self.values)), value_states
        # In half precision keys come out of the rotary embedding in fp32; attention rounds them to the values' type.
        key_states = key_states.to(value_states.dtype)
        before = self if self.is_initialized else self._outer
        found = (key_states, value_states) if before is None else before.then(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*found)
        return found

    def then(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix's keys and values in front of those of a batch."""
        batch = key_states.shape[0]
        keys = torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Return the tokens in the prefix."""
        if self.is_initialized:
            return int(self.keys.shape[-2])
        return self._outer.get_seq_length() if self._outer else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys that a mask covers, from the first token on: sliding windows are masked, not dropped."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return no maximum."""
        return -1


class GrowingLayer(PrefixLayer):
    """A prefix's keys and values, and behind them those of continuations that are run a token at a time."""

    def __init__(self, prefix: PrefixLayer) -> None:
        """Begin at the end of a prefix, which is left as it is."""
        super().__init__(change=prefix._change)
        self.lazy_initialization(prefix.keys, prefix.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the prefix's keys and values and all that came after it."""
        if self._change is not None:
            key_states, value_states = self._change(key_states, value_states)
        self.keys, self.values = self.then(key_states.to(value_states.dtype), value_states)
        return self.keys, self.values


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room for more, so that a step writes its own and copies none of those before."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        """Begin empty."""
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values, the new ones behind those before, [rows, heads, tokens, head size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        room = self._room or (None, None)
        keys, values = _appended(room[0], self.keys, key_states), _appended(room[1], self.values, value_states)
        self._room = (keys[0], values[0])
        self.keys, self.values = keys[1], values[1]
        return self.keys, self.values


def _appended(room: Tensor | None, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return the room that holds kept and new tokens, and what of it is filled; other rows were picked: new room."""
    before = kept.shape[-2] if kept.dim() == new.dim() else 0
    total = before + new.shape[-2]
    if room is None or kept.data_ptr() != room.data_ptr() or len(room) != len(new) or room.shape[-2] < total:
        room = new.new_empty(*new.shape[:-2], total + _MORE_TOKENS, new.shape[-1])
        if before:
            room[..., :before, :] = kept
    room[..., before:total, :] = new
    return room, room[..., :total, :]


def cache_of(layers: Sequence[Any]) -> Any:
    """Return the cache of a model with these layers."""
    return Cache(layers=list(layers))


def empty_cache(model: Any) -> Any:
    """Return the cache that a model would make itself: transformers' by kinds of layers, or a class of its own."""
    own = [
        each
        for each in vars(sys.modules[type(model).__module__]).values()
        if isinstance(each, type) and issubclass(each, DynamicCache) and each.__module__ == type(model).__module__
    ]
    return (
        own[0]() if own else DynamicCache(config=language_config(model.config))
    )  # MiniMax's keeps its running states by itself


def growing_cache(model: Any) -> Any:
    """Return an empty cache for a generation: as the model would make itself, with room in its plain layers."""
    cache = empty_cache(model)
    if type(cache) is DynamicCache:
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_select(cache: Any) -> bool:
    """Return whether some rows of a cache can be kept alone: its layers hold nothing but keys and values."""
    return type(cache) is DynamicCache and all(type(layer) in (*_LENT, RoomyLayer) for layer in cache.layers)


def can_spread(cache: Any) -> bool:
    """Return whether what one row left in a cache can stand for many: it holds the keys and values of all tokens."""
    return type(cache) is DynamicCache and all(type(layer) is RoomyLayer for layer in cache.layers)


def spread_cache(cache: Any, padding: Tensor) -> None:
    """Make the keys and values of one sequence those of many rows, in place; each row has its padding on the left.

    A row's last columns are the first tokens of the sequence; its padding holds anything, and a mask must hide it.

    Args:
        cache: One that `can_spread`, of one row.
        padding: The columns of each row that are padding, [rows].
    """
    for layer in cache.layers:
        tokens = torch.arange(layer.keys.shape[-2], device=layer.keys.device)
        places = (tokens[None, :] - padding.to(tokens.device)[:, None]).clamp(min=0)
        layer.keys, layer.values = (each[0][:, places].transpose(0, 1) for each in (layer.keys, layer.values))


def prefix_cache(model: Any, outer: Any = None, *, apart: bool = False, changes: Sequence[KvChange] = ()) -> Any:
    """Return the cache that a prefix is to be run with.

    Args:
        model: The model.
        outer: The cache of the prefix that it continues.
        apart: Whether continuations attend to its keys and values by `shared`.
        changes: What rounds each layer's keys and values; none where they stay as they are.
    """
    empty = empty_cache(model)
    if type(empty) is not DynamicCache:
        return empty if outer is None else copy.deepcopy(outer)
    outers: Sequence[Any] = [None] * len(empty.layers) if outer is None else outer.layers
    layers = [
        longer_layer(layer, before, apart=apart, change=changes[index] if changes else None)
        for index, (layer, before) in enumerate(zip(empty.layers, outers, strict=False))
    ]
    # By a model that runs its layers in loops (Dory), for each loop after the first.
    added = outers[len(empty.layers) :]
    return cache_of([*layers, *(PrefixLayer(before, apart=apart, change=before._change) for before in added)])


def longer_layer(empty: Any, outer: Any, *, apart: bool = False, change: KvChange | None = None) -> Any:
    """Return the layer of a cache that a prefix is to be run with.

    Args:
        empty: What the model's own cache has there; it is used up.
        outer: This layer of the prefix that it continues; None where it continues none.
        apart: Whether continuations attend to its keys and values by `shared`.
        change: What rounds its keys and values.
    """
    if type(empty) in _LENT:
        return PrefixLayer(outer, apart=apart, change=change)
    return empty if outer is None else copy.deepcopy(outer)


class _Passed(PrefixLayer):
    """Stands for the keys and values of layers that are not run, of which only the tokens count."""

    def __init__(self, tokens: int) -> None:
        """`tokens` are those of the prefix."""
        super().__init__()
        self._tokens = tokens

    def get_seq_length(self) -> int:
        """Return the tokens in the prefix."""
        return self._tokens


def cache_of_layer(kinds: Sequence[Any], layer: Any, tokens: int) -> Any:
    """Return the cache of a model of which one layer alone is run.

    Args:
        kinds: What the model's own cache has for each layer.
        layer: What is kept of the prefix at the layer that is run; it stands for all layers of its kind.
        tokens: The tokens of the prefix.
    """
    attends = layer if isinstance(layer, CacheLayerMixin) else _Passed(tokens)

    def entry(kind: Any) -> Any:
        if isinstance(kind, CacheLayerMixin):
            return attends
        return layer if type(kind) is type(layer) else kind

    return cache_of([entry(kind) for kind in kinds])


_LENT = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that keep nothing but keys and values."""


def continued_cache(prefix: Any, rows: int, *, grows: bool = False) -> Any:
    """Return a cache with which sequences continue a prefix.

    Args:
        prefix: The prefix's cache; it is left as it is.
        rows: The sequences.
        grows: Whether their tokens come one at a time, and see those before them.
    """
    if type(prefix) is not Cache:
        own = copy.deepcopy(prefix)
        own.batch_repeat_interleave(rows)
        return own
    if is_lent(prefix) and not grows:
        return prefix
    return cache_of([continued_layer(layer, rows, grows=grows) for layer in prefix.layers])


def is_lent(cache: Any) -> bool:
    """Return whether all that a prefix left can be lent, so that no continuation takes a copy."""
    return type(cache) is Cache and all(isinstance(layer, PrefixLayer) for layer in cache.layers)


def continued_layer(layer: Any, rows: int, *, grows: bool = False) -> Any:
    """Return a prefix's layer of a cache, or a copy of it, for sequences that continue the prefix.

    Args:
        layer: What the prefix left; it stays as it is.
        rows: The sequences.
        grows: Whether their tokens come one at a time, and see those before them.
    """
    if isinstance(layer, PrefixLayer):
        return GrowingLayer(layer) if grows and layer.is_initialized else layer
    own = copy.deepcopy(layer)
    own.reorder_cache(torch.zeros(rows, dtype=torch.long))
    return own
