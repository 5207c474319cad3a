"""A finished run's rows beside its baseline's, read when they are asked for: what every verdict starts from."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from qeval.errors import BrokenRecordError, unknown
from qeval.report import pairing
from qeval.report.pairing import BASELINE, DriftRows, ItemRows, TokenRows
from qeval.store.rows import RowStore
from qeval.store.run import ProtocolRecord, RunRecord, TaskRecord, VariantRecord, read_run

_KEPT_ROWS = 2_000_000
"""Token rows of variants that are kept at most: some 60 bytes each."""


class PairedRun:
    """A run folder: its record, and one model's rows at a time, checked against the baseline's.

    Answers are kept, and so are the baseline's token rows, and of the variants' as many as `_KEPT_ROWS` allow; others
    are made anew each time, so that only one is held beside them.
    """

    def __init__(self, folder: Path, columns: Sequence[str] = pairing.TOKEN_COLUMNS) -> None:
        """Read the record; rows are read when the first of their kind are asked for, tokens with `columns` alone.

        Raises:
            UsageError: `folder` holds no run.
            BrokenRecordError: its record is torn or of another version.
        """
        self.folder = folder
        self.record: RunRecord = comparable(read_run(folder))
        self._store, self._columns = RowStore(folder), columns
        self._items: dict[tuple[str, str], ItemRows] = {}
        self._tokens: dict[str, TokenRows] = {}

    @property
    def done(self) -> list[VariantRecord]:
        """The variants that have rows."""
        return [variant for variant in self.record.variants if variant.status == "done"]

    @property
    def protocol(self) -> ProtocolRecord | None:
        """How token rows were made; None where the run has none."""
        return self.record.protocol if {"kl", "ppl"} & set(self.record.metrics) else None

    @property
    def backend(self) -> str | None:
        """The baseline's backend; None where the run has no rows."""
        if self.record.tasks:
            table = self._item_table
        elif self.protocol:
            table = self._token_table
        elif self.record.drift:
            table = self._drift_table
        else:
            return None
        rows = pairing.select(table, BASELINE, None)
        found: list[str] = pc.unique(rows["backend"].cast(pa.string())).to_pylist()
        return found[0] if found else None

    def variant(self, name: str) -> VariantRecord:
        """The record of a variant.

        Raises:
            UsageError: the run has none of that name; the nearest are listed.
            BrokenRecordError: it failed, so it has no rows.
        """
        found = {variant.name: variant for variant in self.record.variants}
        if name not in found:
            raise unknown(f"variant of the run '{self.folder}'", name, found)
        if found[name].status != "done":
            raise BrokenRecordError(f"'{name}' failed in this run and has no rows: {found[name].error}")
        return found[name]

    @cached_property
    def baseline_tokens(self) -> TokenRows:
        """The baseline's token rows, as many as the run says it scored."""
        rows = pairing.token_rows(pairing.select(self._token_table, BASELINE, None), BASELINE)
        if self.protocol:
            pairing.check_protocol(rows, self.protocol)
        return rows

    def tokens(self, variant: VariantRecord) -> TokenRows:
        """A variant's token rows, on the baseline's tokens."""
        name = variant.name
        if name in self._tokens:
            return self._tokens[name]
        rows = pairing.token_rows(pairing.select(self._token_table, name, variant.backend), name)
        pairing.pair_tokens(rows, self.baseline_tokens, name)
        if self.protocol and "kl" in self.record.metrics:
            pairing.check_kl(rows, self.protocol, name)
        if len(rows.windows) * (len(self._tokens) + 1) <= _KEPT_ROWS:
            self._tokens[name] = rows
        return rows

    def baseline_items(self, task: TaskRecord) -> ItemRows:
        """The baseline's answers to a task's questions."""
        key = task.name, BASELINE
        if key not in self._items:
            rows = pairing.select(self._item_table, BASELINE, None)
            self._items[key] = pairing.item_rows(rows, task, BASELINE)
        return self._items[key]

    def items(self, task: TaskRecord, variant: VariantRecord) -> ItemRows:
        """A variant's answers to a task's questions, which are the baseline's."""
        key, baseline = (task.name, variant.name), self.baseline_items(task)
        if key not in self._items:
            rows = pairing.select(self._item_table, variant.name, variant.backend)
            found = pairing.item_rows(rows, task, variant.name, baseline)
            pairing.pair_items(found, baseline, task.name, variant.name)
            self._items[key] = found
        return self._items[key]

    @cached_property
    def baseline_drift(self) -> DriftRows:
        """The baseline's greedy continuations."""
        assert self.record.drift is not None
        rows = pairing.select(self._drift_table, BASELINE, None)
        return pairing.drift_rows(rows, self.record.drift, BASELINE)

    def drift(self, variant: VariantRecord) -> DriftRows:
        """A variant's rows along the baseline's continuations."""
        baseline = self.baseline_drift
        assert self.record.drift is not None
        rows = pairing.select(self._drift_table, variant.name, variant.backend)
        found = pairing.drift_rows(rows, self.record.drift, variant.name)
        pairing.pair_drift(found, baseline, variant.name)
        return found

    @cached_property
    def _drift_table(self) -> pa.Table:
        return self._store.read("drift")

    @cached_property
    def _token_table(self) -> pa.Table:
        return self._store.read("tokens", self._columns)

    @cached_property
    def _item_table(self) -> pa.Table:
        return self._store.read("items")


def comparable(record: RunRecord) -> RunRecord:
    """The record with every variant failed that was not asked exactly what the baseline was: none of it is compared."""
    if record.witness is None:
        return record
    variants = [_witnessed(variant, record.witness) for variant in record.variants]
    return record.model_copy(update={"variants": variants})


def _witnessed(variant: VariantRecord, witness: str) -> VariantRecord:
    if variant.status != "done" or variant.witness in (None, witness):
        return variant
    reason = (
        f"It was not asked what the baseline was: the witness of its token ids, positions and BOS is {variant.witness} "
        f"and the baseline's {witness}."
    )
    return variant.model_copy(update={"status": "failed", "error": reason})
