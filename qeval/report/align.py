"""Paired rows: every variant's rows with the baseline's, position by position and question by question.

Nothing is compared that does not stand on the same tokens and the same prompts. Rows that are missing,
doubled or other than the baseline's are an error that names them; they are never dropped.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qeval.errors import BrokenRecordError
from qeval.stats.bootstrap import Clusters, Floats, Ints
from qeval.store.run import DriftRecord, ProtocolRecord, TaskRecord
from qeval.store.schema import LOWER_BOUND_COLUMNS

BASELINE_NAME = "baseline"
Mask = NDArray[np.bool_]

_FLOAT_COLUMNS = (
    "nll", "kl_nats", "reverse_kl_nats", "kl_abs_modelopt", "overlap", "top5_agreement", "top10_agreement",
    "sampling_kl_nats", "outside_nucleus", "delta_p", "kernel_kl_nats", "entropy_nats", *LOWER_BOUND_COLUMNS,
)  # fmt: skip
_OPTIONAL = ("overlap", "top5_agreement", "top10_agreement", "sampling_kl_nats", "outside_nucleus")
"""Columns that a run has at all positions or at none: it is older, or they were not asked for."""
TOKEN_COLUMNS = ("variant", "backend", "corpus", "window", "position", "token", *_FLOAT_COLUMNS, "top1_agreement")
"""What of a token row a report needs."""
FEW_TOKEN_COLUMNS = tuple(
    name for name in TOKEN_COLUMNS if name not in _FLOAT_COLUMNS or name in ("nll", "kl_nats", "kl_lower_bound_nats")
)
"""What an explanation and a diff need: reading takes most of their time."""


QUESTION_PARTS = ("subjects", "items", "prompts", "gold", "starts")
"""The arrays of `ItemRows` that say what was asked."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """One model's token rows in the order of (window, position); all [rows].

    `scored[column]` says where the column holds a number (which may be NaN or infinite: that is counted
    later); elsewhere `values[column]` is 0 and means nothing. Columns that were not read are absent. `stretches` names
    the cluster of each row, where windows overlap or repeat others; None: each window is one.
    """

    windows: Ints
    positions: Ints
    tokens: Ints
    values: dict[str, Floats]
    scored: dict[str, Mask]
    stretches: Ints | None = None

    def of(self, column: str) -> Floats:
        """Return a column where it is scored."""
        return self.values[column][self.scored[column]]

    def clusters(self, column: str) -> Clusters:
        """Return the independent clusters of a column's scored rows: windows, those that overlap or repeat as one."""
        return Clusters.of(self.clusters_of_rows[self.scored[column]])

    @property
    def is_bounded(self) -> bool:
        """Return whether a lower bound of KL stands in the place of a KL: the rows are an endpoint's."""
        return "kl_lower_bound_nats" in self.scored and bool(self.scored["kl_lower_bound_nats"].any())

    @property
    def clusters_of_rows(self) -> Ints:
        """The cluster of each row."""
        return self.windows if self.stretches is None else self.stretches

    def by_window(self, column: str) -> Clusters:
        """Return the windows of a column's scored rows, for what is defined by window."""
        return Clusters.of(self.windows[self.scored[column]])


@dataclass(frozen=True, eq=False)
class ItemRows:
    """One model's answers to a task's questions in the order of (subject, item); all [questions] but two.

    `choices` holds every choice's log-likelihood (nats) one question after the other, `starts` where each
    begins.
    """

    subjects: NDArray[np.object_]
    items: Ints
    prompts: NDArray[np.object_]
    gold: Ints
    pred: Ints
    acc: Floats
    acc_norm: Floats | None
    choices: Floats
    starts: Ints

    def select(self, chosen: Mask) -> "ItemRows":
        """Return some of the questions, [questions] of `chosen`."""
        counts = self.counts()
        choices = self.choices[np.repeat(chosen, counts)]
        starts = np.concatenate([[0], np.cumsum(counts[chosen])[:-1]]).astype(np.int64)
        return ItemRows(
            subjects=self.subjects[chosen],
            items=self.items[chosen],
            prompts=self.prompts[chosen],
            gold=self.gold[chosen],
            pred=self.pred[chosen],
            acc=self.acc[chosen],
            acc_norm=None if self.acc_norm is None else self.acc_norm[chosen],
            choices=choices,
            starts=starts,
        )

    def counts(self) -> Ints:
        """Return how many choices each question has."""
        return np.diff(self.starts, append=len(self.choices))

    def non_finite(self) -> Mask:
        """Return which questions have a log-likelihood that is NaN or infinite."""
        return np.add.reduceat(~np.isfinite(self.choices), self.starts) > 0


@dataclass(frozen=True, eq=False)
class DriftRows:
    """One model's rows along the baseline's continuations, [prompts, generated] each.

    `pred` is what it says where the baseline said `tokens`; both distances are NaN in the baseline's own rows.
    """

    tokens: Ints
    pred: Ints
    kl_nats: Floats
    margin_nats: Floats


def select(table: pa.Table, variant: str, backend: str | None) -> pa.Table:
    """Return the rows of one variant, on its backend; the baseline's (`backend` None) must all be of one backend."""
    rows = table.filter(_is(table["variant"], variant))
    backends = pc.unique(rows["backend"].cast(pa.string())).to_pylist()
    if backend is None and len(backends) > 1:
        raise BrokenRecordError(f"The rows hold baselines of several backends: {sorted(backends)}.")
    if backend is None:
        return rows
    return rows if backends == [backend] else rows.filter(_is(rows["backend"], backend))


def token_rows(table: pa.Table, who: str) -> TokenRows:
    """Return one model's token rows from the store's table of them.

    Raises:
        BrokenRecordError: there are none, some are doubled, or they are of several corpora.
    """
    if not table.num_rows:
        raise BrokenRecordError(f"'{who}' has no token rows; run the same command again.")
    if pc.count_distinct(table["corpus"].cast(pa.string())).as_py() != 1:
        raise BrokenRecordError(f"The token rows of '{who}' are of several corpora.")

    # by window and position, each one once
    windows, positions = _ints(table["window"]), _ints(table["position"])
    order = _in_order(windows, positions)
    windows, positions = windows[order], positions[order]
    doubled = (np.diff(windows) == 0) & (np.diff(positions) == 0)
    if doubled.any():
        row = int(np.argmax(doubled))
        raise BrokenRecordError(
            f"'{who}' has two rows for position {positions[row]} of window {windows[row]}; "
            f"{int(doubled.sum())} are doubled in all."
        )

    values, scored = {}, {}
    for column in (*_FLOAT_COLUMNS, "top1_agreement"):
        if column not in table.column_names:
            continue
        values[column], scored[column] = _column(table[column], order)
    return TokenRows(windows, positions, _ints(table["token"])[order], values, scored)


def _in_order(windows: Ints, positions: Ints) -> Ints:
    """Return the rows by window, then by position, by one stable sort: shards are runs in order already."""
    span = int(positions.max()) + 1
    return np.argsort(windows.astype(np.int64) * span + positions, kind="stable")


def check_protocol(baseline: TokenRows, protocol: ProtocolRecord) -> None:
    """Raise a BrokenRecordError unless the baseline's rows are as many as the run says it scored."""
    windows = len(np.unique(baseline.windows))
    if windows != protocol.windows:
        raise BrokenRecordError(f"The baseline's rows cover {windows} of {protocol.windows} windows.")
    scored = int(baseline.scored["nll"].sum())
    if scored not in (0, protocol.nll_positions):
        raise BrokenRecordError(
            f"The baseline's rows hold {scored} log-likelihoods; the run scored {protocol.nll_positions}."
        )


class RowDifference(NamedTuple):
    """Arrays that two sides should have alike and don't: their name, the rows that differ, and the first of them."""

    what: str
    rows: int
    first: int


def first_difference(one: object, other: object, names: Iterable[str]) -> RowDifference | None:
    """Return the difference in the first of some arrays of two sides that has one, None where all are alike."""
    for name in names:
        differs = getattr(one, name) != getattr(other, name)
        if differs.any():
            return RowDifference(name, int(differs.sum()), int(np.argmax(differs)))
    return None


def pair_tokens(variant: TokenRows, baseline: TokenRows, who: str) -> None:
    """Raise a BrokenRecordError unless a variant's rows stand on the baseline's tokens, all of them."""
    if len(variant.windows) != len(baseline.windows):
        raise BrokenRecordError(
            f"'{who}' has {len(variant.windows)} token rows and the baseline {len(baseline.windows)}"
            f"{_missing_window(variant, baseline)}; run the same command again."
        )
    if differs := first_difference(variant, baseline, ("windows", "positions", "tokens")):
        what, count, row = differs
        raise BrokenRecordError(
            f"'{who}' was not scored on the baseline's {what}: {count} rows differ, "
            f"the first at window {baseline.windows[row]}, position {baseline.positions[row]}."
        )
    if (variant.scored["nll"] != baseline.scored["nll"]).any():
        raise BrokenRecordError(f"'{who}' has log-likelihoods at other positions than the baseline.")


def check_kl(variant: TokenRows, protocol: ProtocolRecord, who: str) -> None:
    """Raise a BrokenRecordError unless the comparing columns are scored as often as the run says."""
    if variant.is_bounded:
        _check_lower_bound(variant, protocol, who)
        return
    scored = int(variant.scored["kl_nats"].sum())
    if scored != protocol.kl_positions:
        raise BrokenRecordError(f"'{who}' has {scored} KL values; the run scored {protocol.kl_positions}.")
    optional = [name for name in _OPTIONAL if name in variant.scored and variant.scored[name].any()]
    for column in ("reverse_kl_nats", "kl_abs_modelopt", "top1_agreement", *optional):
        if column in variant.scored and (variant.scored[column] != variant.scored["kl_nats"]).any():
            raise BrokenRecordError(f"'{who}' has {column} at other positions than kl_nats.")


def _check_lower_bound(variant: TokenRows, protocol: ProtocolRecord, who: str) -> None:
    scored = int(variant.scored["kl_lower_bound_nats"].sum())
    if scored != protocol.kl_positions or variant.scored["kl_nats"].any():
        raise BrokenRecordError(
            f"'{who}' has {scored} lower bounds of KL, the run scored {protocol.kl_positions}; or it has KL values too."
        )


def item_rows(table: pa.Table, task: TaskRecord, who: str, baseline: ItemRows | None = None) -> ItemRows:
    """Return one model's answers to a task from the store's table; `baseline` helps to name what is missing.

    Raises:
        BrokenRecordError: questions are missing or doubled, or the harness's accuracy is.
    """
    rows = table.filter(_mask(_objects(table["task"]) == task.name))
    if rows.num_rows != task.items:
        raise BrokenRecordError(
            f"'{who}' has {rows.num_rows} answers of '{task.name}' and the run asked {task.items} questions"
            f"{_missing_questions(rows, baseline)}; run the same command again."
        )

    # by subject and item, each one once
    order = pc.sort_indices(rows, sort_keys=[("subject", "ascending"), ("item", "ascending")])
    rows = rows.take(order)
    subjects, items = _objects(rows["subject"]), _ints(rows["item"])
    doubled = (subjects[1:] == subjects[:-1]) & (items[1:] == items[:-1])
    if doubled.any():
        row = int(np.argmax(doubled))
        raise BrokenRecordError(f"'{who}' answers question {items[row]} of '{subjects[row]}' twice.")

    if rows["acc"].null_count:
        raise BrokenRecordError(f"'{who}' has answers of '{task.name}' without the harness's accuracy.")
    lists = rows["choice_loglikelihoods"].combine_chunks()
    lengths = _ints(pc.list_value_length(lists))
    if not lengths.all():
        raise BrokenRecordError(f"'{who}' has answers of '{task.name}' without any choice.")

    return ItemRows(
        subjects=subjects,
        items=items,
        prompts=_objects(rows["prompt_sha256"]),
        gold=_ints(rows["gold"]),
        pred=_ints(rows["pred"]),
        acc=_floats(rows["acc"]),
        acc_norm=None if rows["acc_norm"].null_count else _floats(rows["acc_norm"]),
        choices=_floats(lists.flatten()),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
    )


def pair_items(variant: ItemRows, baseline: ItemRows, task: str, who: str) -> None:
    """Raise a BrokenRecordError unless a variant answered the baseline's questions, from the same prompts."""
    if differs := first_difference(variant, baseline, QUESTION_PARTS):
        what, count, row = differs
        raise BrokenRecordError(
            f"'{who}' was not asked the baseline's {task}: {count} {what} differ, "
            f"the first at question {baseline.items[row]} of '{baseline.subjects[row]}'."
        )


def drift_rows(table: pa.Table, record: DriftRecord, who: str) -> DriftRows:
    """Return one model's rows along continuations from the store's table of them.

    Raises:
        BrokenRecordError: they are not those of every token of every prompt of the run, each once.
    """
    shape = (record.prompts, record.generated)
    prompts, positions = _ints(table["prompt"]), _ints(table["position"])
    order = np.lexsort((positions, prompts))
    wanted = np.arange(record.prompts).repeat(record.generated), np.tile(np.arange(record.generated), record.prompts)
    if table.num_rows != len(wanted[0]) or (prompts[order] != wanted[0]).any() or (positions[order] != wanted[1]).any():
        raise BrokenRecordError(
            f"'{who}' has {table.num_rows} rows along continuations, which are not one for each of {record.generated} "
            f"tokens of {record.prompts} prompts; run the same command again."
        )
    kl, margin = (
        np.where(_ints(pc.is_valid(table[name])) > 0, _floats(table[name]), np.nan)[order].reshape(shape)
        for name in ("kl_nats", "margin_nats")
    )
    tokens, pred = (_ints(table[name])[order].reshape(shape) for name in ("token", "pred"))
    return DriftRows(tokens, pred, kl, margin)


def pair_drift(variant: DriftRows, baseline: DriftRows, who: str) -> None:
    """Raise a BrokenRecordError unless a variant was scored along the baseline's own continuations."""
    other = variant.tokens != baseline.tokens
    if other.any():
        prompt, position = (int(place[0]) for place in np.nonzero(other))
        raise BrokenRecordError(
            f"'{who}' was not scored along the baseline's continuations: {int(other.sum())} tokens differ, the "
            f"first at token {position} after prompt {prompt}."
        )


def _is(column: pa.ChunkedArray, name: str) -> pa.Array:
    """Return where a column of names is `name`, by the numbers that stand for names: no string is made of any row."""
    array = column.unify_dictionaries().combine_chunks()
    names = array.dictionary.to_pylist()
    return _mask(_ints(array.indices) == (names.index(name) if name in names else -1))


def _mask(chosen: Mask) -> pa.Array:
    bits = np.packbits(chosen, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(chosen), [None, pa.py_buffer(bits)])


def _missing_questions(rows: pa.Table, baseline: ItemRows | None) -> str:
    """Return how many of the baseline's questions have no row, and the first of them, in brackets."""
    if baseline is None:
        return ""
    there = set(zip(rows["subject"].to_pylist(), rows["item"].to_pylist(), strict=True))
    questions = zip(baseline.subjects.tolist(), baseline.items.tolist(), strict=True)
    missing = [question for question in questions if question not in there]
    if not missing:
        return ""
    subject, item = missing[0]
    return f" ({len(missing)} missing, the first is question {item} of '{subject}')"


def _missing_window(variant: TokenRows, baseline: TokenRows) -> str:
    missing = np.setdiff1d(baseline.windows, variant.windows)
    return f" (window {missing[0]} is missing)" if len(missing) else ""


def _column(column: pa.ChunkedArray, order: Ints) -> tuple[Floats, Mask]:
    scored = _ints(pc.is_valid(column))[order].astype(np.bool_)
    return np.where(scored, _floats(column)[order], 0.0), scored


def _floats(column: pa.ChunkedArray | pa.Array) -> Floats:
    return np.asarray(_numbers(column, pa.float64(), np.float64), np.float64)


def _ints(column: pa.ChunkedArray | pa.Array) -> Ints:
    return np.asarray(_numbers(column, pa.int64(), np.int64), np.int64)


def _numbers(column: pa.ChunkedArray | pa.Array, kind: pa.DataType, dtype: type[np.generic]) -> NDArray[Any]:
    """Return the numbers of a column, read-only; what stands at a null means nothing.

    They are read from Arrow's own memory: its conversions (and every scalar that it is given) import pandas, which
    takes longer than all that a reader computes.
    """
    array = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).cast(kind)
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def _objects(column: pa.ChunkedArray) -> NDArray[np.object_]:
    return np.asarray(column.to_pylist(), np.object_)
