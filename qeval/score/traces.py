"""Rows along text that is forced on every model: chains of thought with their answers, calls of functions.

One pass over a trace tells what a model would do at each of its tokens: how likely each is, whether it would stop or
doubt there, and how much it would leave a grammar by. So variants generate nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.backends.memory import with_fitting_blocks
from qeval.identity import digest
from qeval.metrics.tokens import Logits
from qeval.metrics.traces import Probes, TraceNumbers, trace_numbers
from qeval.score.corpus import Shard, state_positions
from qeval.store.schema import constant_column
from qeval.tasks.traces import Trace
from qeval.types import TokenIds

TRACES_VERSION = 1
"""Part of every key: raise it when what a row of a trace says changes."""
_SHARD_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class TracePart:
    """Consecutive traces of one task, and the sets of tokens whose mass is looked for in them.

    Attributes:
        task: The task's name.
        shard: A window a trace; its KL positions are those whose states are wanted.
        traces: The traces, in the shard's order.
        sets: Ids by the name of the set, such as `stop_p`.
        word: Ids that go on with a word or a number.
    """

    task: str
    shard: Shard
    traces: tuple[Trace, ...]
    sets: Mapping[str, TokenIds]
    word: TokenIds = field(default=())

    def key(self) -> dict[str, Any]:
        """Return what of it changes rows."""
        named = [[trace.item, trace.draw, trace.parts] for trace in self.traces]
        sets = {name: list(ids) for name, ids in self.sets.items()}
        masks = [hashlib.sha256(trace.masks or b"").hexdigest() for trace in self.traces]
        word = digest({"word": list(self.word)})
        return {
            "task": self.task, "traces": named, "sets": sets, "word": word, "masks": masks, **self.shard.key(),
        }  # fmt: skip

    def probes(self) -> Probes:
        """Return what is looked for at the shard's states."""
        windows = self.shard.windows
        targets = [
            window.tokens[place + 1] if place + 1 < len(window.tokens) else -1
            for window in windows
            for place in state_positions(window)
        ]
        packed = [trace.masks for trace in self.traces]
        masks = None
        if all(packed):
            lines = np.frombuffer(b"".join(each for each in packed if each), np.uint8)
            masks = torch.from_numpy(lines.reshape(len(targets), -1).copy())
        return Probes(torch.tensor(targets), _bools(list(self.sets.values())), masks)


def trace_parts(
    task: str, traces: tuple[Trace, ...], sets: Mapping[str, TokenIds], word: TokenIds = ()
) -> tuple[TracePart, ...]:
    """Return traces in parts of about 4,096 tokens, whatever the batch size, so that finished rows are found again.

    Args:
        task: The task's name.
        traces: The traces, in order.
        sets: The sets of tokens whose mass is looked for.
        word: Ids that go on with a word or a number.
    """
    size = max(1, _SHARD_TOKENS // max(len(trace.window.tokens) for trace in traces))
    starts = range(0, len(traces), size)
    return tuple(
        TracePart(task, Shard(start, tuple(each.window for each in traces[start : start + size])),
                  traces[start : start + size], sets, word)
        for start in starts
    )  # fmt: skip


def trace_columns(
    base: tuple[Logits, Tensor] | None, session: Session, states: Tensor, part: TracePart, names: dict[str, str]
) -> dict[str, Any]:
    """Return the rows of a part, one a state.

    Args:
        base: The baseline's head and states; None for the baseline itself.
        session: The model's.
        states: The model's states, [positions of all traces, width].
        part: The traces.
        names: `variant` and `backend`.
    """
    probes = part.probes()
    compute = partial(_numbers, session, states, probes, base)
    found = with_fitting_blocks(session, compute)
    rows, targets = len(states), probes.targets
    # behind an answer no token is forced: there it is over unless a word or a number would go on
    goes_on = torch.isin(found.pred, torch.tensor(part.word, dtype=torch.int64))
    matches = torch.where(targets < 0, ~goes_on, found.pred == targets)
    columns: dict[str, Any] = {name: constant_column(value, rows) for name, value in names.items()}
    columns |= _places(part)
    for name in ("stop_p", "doubt_p"):
        place = list(part.sets).index(name) if name in part.sets else None
        columns[name] = pa.nulls(rows, pa.float64()) if place is None else found.masses[place].numpy()
    return columns | {
        "task": constant_column(part.task, rows),
        "token": targets.numpy().astype(np.int32),
        "pred": found.pred.numpy().astype(np.int32),
        "matches": matches.numpy(),
        "log_p": pa.array(found.log_p.numpy(), mask=(targets < 0).numpy()),
        "kl_nats": pa.nulls(rows, pa.float64()) if found.kl_nats is None else found.kl_nats.numpy(),
        "leak_p": pa.nulls(rows, pa.float64()) if found.leak is None else found.leak.numpy(),
    }


def _numbers(
    session: Session, states: Tensor, probes: Probes, base: tuple[Logits, Tensor] | None, block: int
) -> TraceNumbers:
    return trace_numbers(session.logits, states, probes, block, base)


def _places(part: TracePart) -> dict[str, Any]:
    """Return the columns that say which token of which trace a row is of."""
    item: list[int] = []
    draw: list[int] = []
    kind: list[str] = []
    position: list[int] = []
    for trace in part.traces:
        for name, count in trace.parts:
            item += [trace.item] * count
            draw += [trace.draw] * count
            kind += [name] * count
            position += range(count)
    return {
        "item": np.asarray(item, np.int32),
        "draw": np.asarray(draw, np.int32),
        "part": kind,
        "position": np.asarray(position, np.int32),
    }


def _bools(sets: list[TokenIds]) -> Tensor:
    """Return sets of ids as bools [sets, tokens], as wide as the largest id needs."""
    width = max((token for ids in sets for token in ids), default=0) + 1
    found = torch.zeros((len(sets), width), dtype=torch.bool)
    for place, ids in enumerate(sets):
        found[place, list(ids)] = True
    return found
