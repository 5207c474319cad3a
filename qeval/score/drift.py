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

from qeval.backends.base import Continues, Session
from qeval.errors import QevalError
from qeval.metrics.greedy import choices
from qeval.metrics.tokens import Logits
from qeval.progress import Advance
from qeval.score.schedule import windows_schedule
from qeval.store.schema import constant_column
from qeval.tasks.drift import Ids
from qeval.types import Call, Request

DRIFT_VERSION = 1
"""Part of every key: raise it when what a row of a continuation says changes."""

_PART_PROMPTS = 8


@dataclass(frozen=True)
class Part:
    """Consecutive prompts of one length, the first of them number `first`, to be continued by `count` tokens each."""

    first: int
    prompts: tuple[Ids, ...]
    count: int

    @property
    def tokens(self) -> int:
        """Tokens to run along the continuations."""
        return sum(len(prompt) + self.count - 1 for prompt in self.prompts)

    def key(self) -> dict[str, Any]:
        """What of it changes rows."""
        return {"first": self.first, "prompts": self.prompts, "count": self.count}


@dataclass(frozen=True, eq=False)
class Continuation:
    """The baseline's: `tokens` [prompts, count], and the states that chose them, [prompts * count, width]."""

    tokens: Tensor
    states: Tensor


def parts_of(prompts: Sequence[Ids], count: int) -> tuple[Part, ...]:
    """Eight prompts a part; never depends on batch sizes, so that finished rows are found again."""
    starts = range(0, len(prompts), _PART_PROMPTS)
    return tuple(Part(start, tuple(prompts[start : start + _PART_PROMPTS]), count) for start in starts)


def continue_greedily(session: Session, part: Part) -> Tensor:
    """The most likely tokens, one after another, [prompts, count].

    Raises:
        QevalError: the session can't generate.
    """
    if not isinstance(session, Continues):
        raise QevalError("This backend can't generate the baseline's continuations; leave drift out of --tasks.")
    return session.greedy(part.prompts, part.count)


def part_calls(part: Part, tokens: Tensor, batch_tokens: int) -> list[Call]:
    """What `part_states` will ask its session for, in order; `tokens` [prompts, count] are the baseline's."""
    requests = [
        Request((*prompt, *said[:-1]), tuple(range(len(prompt) - 1, len(prompt) + part.count - 1)))
        for prompt, said in zip(part.prompts, tokens.tolist(), strict=True)
    ]
    return windows_schedule(requests, batch_tokens)


def part_states(session: Session, part: Part, tokens: Tensor, batch_tokens: int, advance: Advance) -> Tensor:
    """The states that predict each token of the baseline's continuations, [prompts * count, width] on the CPU."""
    found: list[Tensor] = []
    for call in part_calls(part, tokens, batch_tokens):
        found += [states.cpu() for states in session.states(call.requests)]
        advance(sum(len(request.tokens) for request in call.requests))
    return torch.cat(found)


def drift_columns(
    base_logits: Logits,
    base: Continuation,
    session: Session,
    states: Tensor,
    part: Part,
    names: dict[str, str],
    *,
    own: bool = False,
) -> dict[str, Any]:
    """The rows of a part, one a generated token; `own`: they are the baseline's, and are compared with nothing."""
    chosen = base.tokens.flatten()
    found = choices(base_logits, base.states, session.logits, states, chosen, session.block_rows)
    rows = len(chosen)
    nothing = pa.nulls(rows, pa.float64())
    columns: dict[str, Any] = {name: constant_column(value, rows) for name, value in names.items()}
    return columns | {
        "prompt": np.repeat(np.arange(part.first, part.first + len(part.prompts), dtype=np.int32), part.count),
        "position": np.tile(np.arange(part.count, dtype=np.int32), len(part.prompts)),
        "token": chosen.numpy().astype(np.int32),
        "pred": found.pred.numpy().astype(np.int32),
        "kl_nats": nothing if own else found.kl_nats.numpy(),
        "margin_nats": nothing if own else found.margin_nats.numpy(),
    }
