"""A model's keys and values on their way into attention, after the rotary embedding: seen there, or changed.

Attention in transformers hands its keys and values to a cache and computes with what the cache returns. So a cache that
changes them changes exactly what attention reads, the current position's included. Whether a model's attention does so
is not taken on trust: `check_cache` runs a few tokens and compares the tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from qeval.errors import UsageError, first_line
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.trace import probe_tokens, text_config

KvChange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's new keys and values, [batch, heads, tokens, size] each, and returns those that attention sees."""

_WATCHING = "qeval_watched_cache"
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class HeadShape(NamedTuple):
    """The sizes of one layer's keys and values for a token: [heads, size] each."""

    keys: tuple[int, int]
    values: tuple[int, int]


class PassingLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a cache that keeps nothing: whole sequences go through it, changed."""

    is_sliding = False

    def __init__(self, change: KvChange) -> None:
        """Begin without tokens, and stay so."""
        super().__init__()
        self._change = change

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the changed keys and values."""
        return self._change(key_states, value_states)

    def get_seq_length(self) -> int:
        """Return no tokens."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys that a mask covers."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return no maximum."""
        return -1


def passing_cache(changes: Sequence[KvChange]) -> Any:
    """Return a cache for whole sequences, of one layer for each change."""
    return Cache(layers=[PassingLayer(change) for change in changes])


@torch.inference_mode()
def check_cache(model: Any, device: torch.device | None = None) -> list[HeadShape]:
    """Return the shapes of a model's keys and values by layer, if its attention reads what its cache returns.

    Args:
        model: The model.
        device: Where it computes, where its parameters don't say that.

    Raises:
        UsageError: Its attention is of another kind, so that rounded keys and values would go unread or misread.
    """
    name = type(model).__name__
    if getattr(text_config(model), "kv_lora_rank", None) is not None:
        raise UsageError(f"{name} caches latents in the place of keys and values, and qeval does not round those.")
    try:
        return _shapes(model, device or model.device)
    except UsageError:
        raise
    except _FAILURES as error:
        raise _unknown_attention(model, f"{type(error).__name__}: {first_line(error)}") from error


def _shapes(model: Any, device: torch.device) -> list[HeadShape]:
    """Run a few tokens, and compare what attention reads with what the cache returned."""
    layers = int(text_config(model).num_hidden_layers)
    returned: list[tuple[Tensor, Tensor]] = []
    read: list[tuple[Tensor, Tensor]] = []

    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        returned.append((keys.clone(), values.clone()))
        return returned[-1]

    ids, states = probe_tokens(model, device), FinalStates(model)
    with _watched_attention(model, read):
        states(ids, passing_cache([change] * layers))
    pairs = zip(returned, read, strict=False)
    if len(returned) != layers or len(read) != layers:
        raise _unknown_attention(
            model, f"{len(returned)} layers cache keys and values, {len(read)} attend, of {layers}"
        )
    if not all(one is other for mine, seen in pairs for one, other in zip(mine, seen, strict=True)):
        raise _unknown_attention(model, "it attends to other tensors than those that its cache returned")
    if any(part.dim() != 4 or part.shape[2] != ids.shape[1] for pair in returned for part in pair):
        raise _unknown_attention(model, "what it caches is not [batch, heads, tokens, size]")
    return [HeadShape((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])) for keys, values in returned]


def _unknown_attention(model: Any, reason: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__}'s attention is of a kind whose keys and values qeval can't round ({reason}); leave "
        "the +kv, +k and +v parts out."
    )


@contextmanager
def _watched_attention(model: Any, read: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note the keys and values of every call of attention, which attends to nothing meanwhile."""
    config = text_config(model)
    before = config._attn_implementation

    def watch(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        read.append((key, value))
        batch, heads, tokens, _size = query.shape
        return value.new_zeros(batch, tokens, heads, value.shape[-1]), None

    AttentionInterface.register(_WATCHING, watch)
    AttentionMaskInterface.register(_WATCHING, lambda *_, **__: None)
    config._attn_implementation = _WATCHING
    try:
        yield
    finally:
        config._attn_implementation = before
