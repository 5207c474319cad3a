"""Greedy continuations of the baseline, and what every variant would say along them.

One pass over prompt and continuation tells all of a free run up to where it leaves the baseline: until then its
context is the baseline's own, so it leaves at the first position where the variant's most likely token is another. With
the baseline's token forced there, it goes on with the baseline for as long as the next positions agree. So variants
generate nothing, and every backend that gives states can be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.metrics.greedy import choices
from qeval.metrics.tokens import Logits
from qeval.progress import Advance
from qeval.score.schedule import windows_schedule
from qeval.store.schema import constant_column
from qeval.types import Call, Request, TokenIds

DRIFT_VERSION = 1
"""Part of every key: raise it when what a row of a continuation says changes."""

_PART_PROMPTS = 8


@dataclass(frozen=True)
class DriftPart:
    """Consecutive prompts of one length, the first of them number `first`, to be continued by `count` tokens each."""

    first: int
    prompts: tuple[TokenIds, ...]
    count: int

    @property
    def tokens(self) -> int:
        """Tokens to run along the continuations."""
        return sum(len(prompt) + self.count - 1 for prompt in self.prompts)

    def key(self) -> dict[str, Any]:
        """Return what of it changes rows."""
        return {"first": self.first, "prompts": self.prompts, "count": self.count}


@dataclass(frozen=True, eq=False)
class Continuation:
    """The baseline's: `tokens` [prompts, count], and the states that chose them, [prompts * count, width]."""

    tokens: Tensor
    states: Tensor


def parts_of(prompts: Sequence[TokenIds], count: int) -> tuple[DriftPart, ...]:
    """Eight prompts a part; never depends on batch sizes, so that finished rows are found again."""
    starts = range(0, len(prompts), _PART_PROMPTS)
    return tuple(DriftPart(start, tuple(prompts[start : start + _PART_PROMPTS]), count) for start in starts)


def part_calls(part: DriftPart, tokens: Tensor, batch_tokens: int) -> list[Call]:
    """Return what `part_states` will ask its session for, in order; `tokens` [prompts, count] are the baseline's."""
    requests = [
        Request((*prompt, *said[:-1]), tuple(range(len(prompt) - 1, len(prompt) + part.count - 1)))
        for prompt, said in zip(part.prompts, tokens.tolist(), strict=True)
    ]
    return windows_schedule(requests, batch_tokens)


def part_states(session: Session, part: DriftPart, tokens: Tensor, batch_tokens: int, advance: Advance) -> Tensor:
    """Return the states that predict the baseline's continuations, [prompts * count, width]."""
    parts: list[Tensor] = []
    for call in part_calls(part, tokens, batch_tokens):
        parts += session.states(call.requests)
        advance(sum(len(request.tokens) for request in call.requests))
    return torch.cat(parts)


def drift_columns(
    base_logits: Logits,
    base: Continuation,
    session: Session,
    states: Tensor,
    part: DriftPart,
    names: dict[str, str],
    *,
    own: bool = False,
) -> dict[str, Any]:
    """Return the rows of a part, one a generated token; `own`: they are the baseline's, compared with nothing."""
    chosen = base.tokens.flatten()
    compared = choices(base_logits, base.states, session.logits, states, chosen, session.block_rows)
    rows = len(chosen)
    nothing = pa.nulls(rows, pa.float64())
    columns: dict[str, Any] = {name: constant_column(value, rows) for name, value in names.items()}
    return columns | {
        "prompt": np.repeat(np.arange(part.first, part.first + len(part.prompts), dtype=np.int32), part.count),
        "position": np.tile(np.arange(part.count, dtype=np.int32), len(part.prompts)),
        "token": chosen.numpy().astype(np.int32),
        "pred": compared.pred.numpy().astype(np.int32),
        "kl_nats": nothing if own else compared.kl_nats.numpy(),
        "margin_nats": nothing if own else compared.margin_nats.numpy(),
    }
