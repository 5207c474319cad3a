"""Attention of a batch that continues one prefix, without a copy of the prefix's keys and values for every row.

Sequences of unequal length may be *packed*, one behind the other in a single row, so that no projection computes
padding; attention alone then sees them apart. Two ways keep one contract: the states are those of full forward passes.

On a GPU a row's mask is compiled into one kernel (`row_attention.py`), sliding windows and soft caps with it.

On a CPU all rows' queries attend to the prefix at once, as if they were one sequence, and each row to its own tokens;
the two parts are joined by the sums that their softmaxes were divided by. This took half the time of expanding and
masking (20 rows of 100 tokens after 700: 80 ms against 148, one core). Only where attention is plainly causal and in
fp32: a sliding window would have to be cut out of either part.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from qeval.backends.row_attention import RowLayout, attend_row
from qeval.errors import QevalError
from qeval.models.structure.forward import body_of
from qeval.models.structure.trace import text_config

SHARED_ATTENTION = "qeval_shared_prefix"
_PLAIN = {"full_attention"}
_WINDOWED = {"full_attention", "sliding_attention"}


class Lent(NamedTuple):
    """One layer's keys and values of a prefix, [1, heads, tokens, head size] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A row of sequences of `lengths` tokens, in order.

    Where each token lies is computed when the CPU's way asks for it: a GPU's takes the lengths alone, and would wait.
    """

    lengths: tuple[int, ...]
    device: torch.device

    def apart(self, row: Tensor) -> Tensor:
        """[1, heads, tokens, size] as [sequences, heads, longest, size]; what follows a sequence's end is arbitrary."""
        return row[0][:, self._index].transpose(0, 1)

    def together(self, sequences: Tensor) -> Tensor:
        """[sequences, heads, longest, ...] as [1, heads, tokens, ...]."""
        return sequences.transpose(1, 2).flatten(0, 1)[self._tokens].transpose(0, 1).unsqueeze(0)

    @cached_property
    def _is_token(self) -> Tensor:
        """Return which places of [sequences, longest] a sequence reaches."""
        return torch.arange(max(self.lengths), device=self.device) < self._column

    @cached_property
    def _index(self) -> Tensor:
        """Return each token's place in the row, [sequences, longest]; 0 where a sequence has ended."""
        steps = torch.arange(max(self.lengths), device=self.device)
        return (self._column.cumsum(0) - self._column + steps).masked_fill(~self._is_token, 0)

    @cached_property
    def _tokens(self) -> Tensor:
        """Return which entries of `_index`, flattened, are tokens, [tokens]."""
        return self._is_token.flatten().nonzero().flatten()

    @property
    def _column(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device).unsqueeze(1)


_PACKED: ContextVar[PackedRow | None] = ContextVar("qeval_packed", default=None)
"""How the row that is being run is packed; transformers has no argument that reaches attention in every family."""

_ROWS: ContextVar[dict[tuple[tuple[int, ...], torch.device], RowLayout]] = ContextVar("qeval_rows")
"""The row of the forward pass that is being run, by its sequences' lengths and device: its masks serve all layers."""

_AWAITED: ContextVar[Lent | None] = ContextVar("qeval_awaited", default=None)
"""The prefix that the cache lent last, until attention has seen it."""


def can_share(model: Any, device: torch.device) -> bool:
    """Return whether a model's attention is causal in a way that can be taken apart; `device`: where it runs.

    On a GPU windows and soft caps may be, in any type; on the CPU neither, by SDPA in fp32. The weights of a streamed
    model are on no device while it is asked.
    """
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or _PLAIN)
    if model._is_stateful or getattr(config, "kv_lora_rank", None) is not None:
        return False  # there are running states, or keys are made out of what is cached
    if runs_rows(device):
        return config._attn_implementation in ("sdpa", "eager") and kinds <= _WINDOWED
    windows = getattr(config, "sliding_window", None) is not None
    plain = config._attn_implementation == "sdpa" and kinds <= _PLAIN and not windows
    return bool(plain and model.get_output_embeddings().weight.dtype == torch.float32 and device.type == "cpu")


def runs_rows(device: torch.device) -> bool:
    """Return whether a device attends to rows by a compiled mask."""
    return device.type == "cuda"


def can_pack(model: Any, device: torch.device) -> bool:
    """Return whether sequences may also be packed: the model is told every token's position."""
    return can_share(model, device) and "position_ids" in inspect.signature(body_of(model).forward).parameters


def tagged(keys: Tensor, lent: Lent) -> Tensor:
    """Keys of a batch that attention will find the prefix's beside."""
    keys.qeval_prefix = lent  # type: ignore[attr-defined]
    _AWAITED.set(lent)
    return keys


@contextmanager
def shared_attention(model: Any, packed: PackedRow | None = None) -> Iterator[None]:
    """Forward passes of `model` attend by parts; the sequences of one that runs a `packed` row don't see each other."""
    config = text_config(model)
    before = config._attn_implementation
    token, rows = _PACKED.set(packed), _ROWS.set({})
    config._attn_implementation = SHARED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        _PACKED.reset(token)
        _ROWS.reset(rows)
        _AWAITED.set(None)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend from queries [batch, heads, tokens, size] to what is before them and to the prefix that tags `key`.

    Returns [batch, tokens, heads, size], as transformers' own attention functions.

    Raises:
        QevalError: the keys are not those that the cache gave, so the prefix would go unseen; or the layer's window is
            another than the configuration's.
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
    if runs_rows(query.device):
        return _attend_by_row(module, query, key, value, lent, kwargs), None
    near, near_sum = _near(query, key, value, scale)
    if lent is None:
        return near.transpose(1, 2).contiguous(), None
    batch, heads, tokens, size = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, batch * tokens, size)
    far, far_sum = _part(rows, lent.keys, lent.values, scale, causal=False)
    far = far.reshape(heads, batch, tokens, size).transpose(0, 1)
    share = torch.sigmoid(far_sum.reshape(heads, batch, tokens).transpose(0, 1) - near_sum).unsqueeze(-1)
    return torch.lerp(near, far, share).transpose(1, 2).contiguous(), None


def _attend_by_row(
    module: Any, query: Tensor, key: Tensor, value: Tensor, lent: Lent | None, kwargs: dict[str, Any]
) -> Tensor:
    batch, _, tokens, _ = query.shape
    packed, rows = _PACKED.get(), _ROWS.get()
    lengths = (tokens,) * batch if packed is None else packed.lengths
    place = lengths, query.device
    if place not in rows:
        rows[place] = RowLayout(lengths, query.device)
    query, key, value = (part.transpose(0, 1).flatten(1, 2).unsqueeze(0) for part in (query, key, value))
    found = attend_row(
        query, key, value, rows[place], lent,
        scale=kwargs.get("scaling"), window=_window(module, kwargs), soft_cap=kwargs.get("softcap"),
    )  # fmt: skip
    return found.transpose(1, 2).reshape(batch, tokens, *found.shape[1::2])


def _window(module: Any, kwargs: dict[str, Any]) -> int | None:
    """Return a layer's window, which its configuration and what it hands to attention must agree on."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    slides = kinds[module.layer_idx] == "sliding_attention" if kinds else True
    stated: int | None = getattr(config, "sliding_window", None) if slides else None
    handed = kwargs.get("sliding_window")
    others = sorted(name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None)
    if handed != stated or others:
        raise QevalError(
            f"{type(module).__name__} hands attention a window of {handed} where its configuration says {stated}"
            + (f", and {', '.join(others)}" if others else "")
            + ", so sequences of this model can't share a row."
        )
    return stated


def _near(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attend from each sequence to its own tokens, as `_part` gives it."""
    packed = _PACKED.get()
    if packed is None:
        return _part(query, key, value, scale, causal=True)
    found, sums = _part(packed.apart(query), packed.apart(key), packed.apart(value), scale, causal=True)
    return packed.together(found), packed.together(sums)


def _part(query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return attention [batch, heads, tokens, size] and the logarithm of its softmax's sum [batch, heads, tokens]."""
    repeat = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, scale=scale
    )
    return found


def _no_mask(*_: Any, **__: Any) -> None:
    """Return None: no mask is needed."""


AttentionInterface.register(SHARED_ATTENTION, attend)
AttentionMaskInterface.register(SHARED_ATTENTION, _no_mask)
