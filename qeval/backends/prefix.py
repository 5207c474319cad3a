"""A prefix's keys and values in a transformers cache: computed once, lent to any number of continuations."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qeval.backends.shared import Lent, tagged
from qeval.models.structure.kv_cache import KvChange


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


def cache_of(layers: list[PrefixLayer]) -> Any:
    """Return the cache of a model with these layers."""
    return Cache(layers=layers)
