"""Attention of a batch that continues one prefix, without a copy of the prefix's keys and values for every row.

All rows' queries attend to the prefix at once, as if they were one sequence, and each row to its own tokens; the two
parts are joined by the sums that their softmaxes were divided by. On a CPU this took half the time of expanding and
masking (20 rows of 100 tokens after 700: 80 ms against 148, one core). Sequences of unequal length may be *packed*, one
behind the other in a single row, so that no projection computes padding; attention alone then sees them apart. Only
where attention is plainly causal: a sliding window would have to be cut out of either part.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from qeval.errors import QevalError
from qeval.models.trace import text_config

NAME = "qeval_shared_prefix"
_PLAIN = {"full_attention"}


class Lent(NamedTuple):
    """One layer's keys and values of a prefix, [1, heads, tokens, head size] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the tokens of sequences lie that were packed into one row: `index` [sequences, longest] tells each token's
    place (0 where a sequence has ended), `kept` [tokens] which entries of `index`, flattened, are tokens."""

    index: Tensor
    kept: Tensor

    def apart(self, row: Tensor) -> Tensor:
        """[1, heads, tokens, size] as [sequences, heads, longest, size]; what follows a sequence's end is arbitrary."""
        return row[0][:, self.index].transpose(0, 1)

    def together(self, sequences: Tensor) -> Tensor:
        """[sequences, heads, longest, ...] as [1, heads, tokens, ...]."""
        return sequences.transpose(1, 2).flatten(0, 1)[self.kept].transpose(0, 1).unsqueeze(0)


def packing(lengths: Sequence[int], device: torch.device) -> Packed:
    """How sequences of these lengths lie in one row, in order."""
    own = torch.tensor(lengths, device=device).unsqueeze(1)
    steps = torch.arange(int(own.max()), device=device)
    is_token = steps < own
    index = (own.cumsum(0) - own + steps).masked_fill(~is_token, 0)
    return Packed(index, is_token.flatten().nonzero().flatten())


_PACKED: ContextVar[Packed | None] = ContextVar("qeval_packed", default=None)
"""How the row that is being run is packed; transformers has no argument that reaches attention in every family."""

_AWAITED: ContextVar[Lent | None] = ContextVar("qeval_awaited", default=None)
"""The prefix that the cache lent last, until attention has seen it."""


def can_share(model: Any) -> bool:
    """Whether a model's attention is plainly causal, computed by SDPA in fp32 on the CPU."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or _PLAIN)
    windows = getattr(config, "sliding_window", None) is not None
    latents = getattr(config, "kv_lora_rank", None) is not None  # keys are made out of what is cached
    plain = config._attn_implementation == "sdpa" and kinds <= _PLAIN and not windows and not latents
    weight = model.get_output_embeddings().weight
    return bool(plain and weight.dtype == torch.float32 and weight.device.type in ("cpu", "meta"))


def can_pack(model: Any) -> bool:
    """Whether sequences may also be packed: the model is told every token's position."""
    return can_share(model) and "position_ids" in inspect.signature(model.base_model.forward).parameters


def tagged(keys: Tensor, lent: Lent) -> Tensor:
    """Keys of a batch that attention will find the prefix's beside."""
    keys.qeval_prefix = lent  # type: ignore[attr-defined]
    _AWAITED.set(lent)
    return keys


@contextmanager
def shared_attention(model: Any, packed: Packed | None = None) -> Iterator[None]:
    """Forward passes of `model` attend by parts; the sequences of one that runs a `packed` row don't see each other."""
    config = text_config(model)
    before = config._attn_implementation
    token = _PACKED.set(packed)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _PACKED.reset(token)
        _AWAITED.set(None)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Of queries [batch, heads, tokens, size] to what is before them, and to the prefix that `key` is tagged with.

    Returns [batch, tokens, heads, size], as transformers' own attention functions.

    Raises:
        QevalError: the keys are not those that the cache gave, so the prefix would go unseen.
    """
    del attention_mask  # causal, and padding is on the right
    lent: Lent | None = getattr(key, "qeval_prefix", None)
    if lent is not _AWAITED.get():
        raise QevalError(
            f"{type(module).__name__} attends to other keys than those it cached, in a way that qeval does not know, "
            "so its scores would be wrong; please report the model."
        )
    _AWAITED.set(None)
    scale = kwargs.get("scaling")
    near, near_sum = _near(query, key, value, scale)
    if lent is None:
        return near.transpose(1, 2).contiguous(), None
    batch, heads, tokens, size = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, batch * tokens, size)
    far, far_sum = _part(rows, lent.keys, lent.values, scale, causal=False)
    far = far.reshape(heads, batch, tokens, size).transpose(0, 1)
    share = torch.sigmoid(far_sum.reshape(heads, batch, tokens).transpose(0, 1) - near_sum).unsqueeze(-1)
    return torch.lerp(near, far, share).transpose(1, 2).contiguous(), None


def _near(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Of each sequence to its own tokens, as `_part` gives it."""
    packed = _PACKED.get()
    if packed is None:
        return _part(query, key, value, scale, causal=True)
    found, sums = _part(packed.apart(query), packed.apart(key), packed.apart(value), scale, causal=True)
    return packed.together(found), packed.together(sums)


def _part(query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of its softmax's sum, [batch, heads, tokens, size] and [batch, heads, tokens]."""
    repeat = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, scale=scale
    )
    return found


def _no_mask(*_: Any, **__: Any) -> None:
    """None is needed."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
