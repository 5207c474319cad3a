"""Rows along traces, every variant's with the baseline's: chains of thought with their answers, calls of functions.

As with other rows, what is missing, doubled or other than the baseline's is an error that names it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qeval.errors import BrokenRecordError
from qeval.report.align import Mask, first_difference
from qeval.stats.bootstrap import Floats, Ints
from qeval.store.trace_records import GrammarRecord, ReasoningRecord

_ORDER = {"chain": 0, "call": 0, "answer": 1, "after": 2}
_NUMBERS = ("log_p", "kl_nats", "stop_p", "doubt_p", "leak_p")


@dataclass(frozen=True, eq=False)
class TraceRows:
    """One model's rows in the order of (item, draw, piece, position), [rows] each; `values` are NaN where null.

    `ended` says of each trace whether it ended before the limit of length, [traces].
    """

    items: Ints
    draws: Ints
    pieces: NDArray[np.object_]
    tokens: Ints
    matches: Mask
    values: dict[str, Floats]
    ended: Mask

    @cached_property
    def traces(self) -> Ints:
        """The trace of each row, counted from 0, [rows]."""
        new = np.ones(len(self.items), np.bool_)
        new[1:] = (self.items[1:] != self.items[:-1]) | (self.draws[1:] != self.draws[:-1])
        return np.asarray(np.cumsum(new) - 1, np.int64)

    @cached_property
    def items_of_traces(self) -> Ints:
        """The item of each trace, [traces]."""
        return self.items[np.unique(self.traces, return_index=True)[1]]

    def of(self, name: str, *pieces: str) -> Iterator[Floats]:
        """Yield a column's values in some pieces of each trace, in order."""
        inside = np.isin(self.pieces, pieces)
        for trace in range(len(self.ended)):
            yield self.values[name][inside & (self.traces == trace)]

    def sums(self, name: str, *pieces: str) -> Floats:
        """Return the sum of a column over some pieces of each trace, [traces]."""
        return np.asarray([values.sum() for values in self.of(name, *pieces)], np.float64)

    def non_finite(self, *names: str) -> int:
        """Return how many rows have a probability or a distance that is NaN or infinite.

        Args:
            names: The columns that every row has.
        """
        bad = np.zeros(len(self.items), np.bool_)
        for name in names:
            bad |= ~np.isfinite(self.values[name])
        return int(bad.sum())


def trace_rows(table: pa.Table, task: str, record: ReasoningRecord | GrammarRecord, who: str) -> TraceRows:
    """Return one model's rows of a task from the store's table of them.

    Args:
        table: The model's rows.
        task: The task's name.
        record: The run's record of its traces.
        who: The name that an error gives the model.

    Raises:
        BrokenRecordError: They are not those of every token of every trace, each once.
    """
    rows = table.filter(pc.equal(table["task"].cast(pa.string()), task))
    items, draws, positions, tokens = (
        np.asarray(rows[name].to_pylist(), np.int64) for name in ("item", "draw", "position", "token")
    )
    pieces = np.asarray(rows["part"].to_pylist(), np.object_)
    kinds = np.asarray([_ORDER[piece] for piece in pieces], np.int64)
    order = np.lexsort((positions, kinds, draws, items))

    # the run says how long each chain or call is
    said = sorted((trace.item, trace.draw, place) for trace in record.traces for place in range(trace.tokens))
    main = order[kinds[order] == 0]
    if said != list(zip(items[main].tolist(), draws[main].tolist(), positions[main].tolist(), strict=True)):
        raise BrokenRecordError(
            f"'{who}' has {len(main)} rows along the traces of {task}, which are not one for each of their "
            f"{len(said)} tokens; run the same command again."
        )
    ended = sorted((trace.item, trace.draw, trace.ended) for trace in record.traces)
    values = {
        name: np.asarray([np.nan if each is None else each for each in rows[name].to_pylist()], np.float64)[order]
        for name in _NUMBERS
    }
    return TraceRows(
        items=items[order],
        draws=draws[order],
        pieces=pieces[order],
        tokens=tokens[order],
        matches=np.asarray(rows["matches"].to_pylist(), np.bool_)[order],
        values=values,
        ended=np.asarray([each[2] for each in ended], np.bool_),
    )


def pair_traces(variant: TraceRows, baseline: TraceRows, task: str, who: str) -> None:
    """Raise a BrokenRecordError unless a variant was scored along the baseline's own traces."""
    if len(variant.items) != len(baseline.items):
        raise BrokenRecordError(
            f"'{who}' has {len(variant.items)} rows along the traces of {task} and the baseline {len(baseline.items)}; "
            "run the same command again."
        )
    if differs := first_difference(variant, baseline, ("items", "draws", "pieces", "tokens")):
        what, count, row = differs
        raise BrokenRecordError(
            f"'{who}' was not scored along the baseline's traces of {task}: {count} {what} differ, the first in item "
            f"{baseline.items[row]}."
        )
