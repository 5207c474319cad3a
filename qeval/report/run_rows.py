"""A finished run's rows, paired with its baseline's and read on demand: what every verdict starts from."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from qeval.errors import BrokenRecordError, unknown
from qeval.report import align
from qeval.report.align import BASELINE_NAME, DriftRows, ItemRows, TokenRows
from qeval.report.independent import is_first_text, question_notes, window_clusters, window_notes
from qeval.report.needle_rows import NeedleRows, needle_rows, pair_needles
from qeval.report.score_rows import ScoreRows, pair_scores, score_rows
from qeval.report.trace_rows import TraceRows, pair_traces, trace_rows
from qeval.store.attempts import check_finished
from qeval.store.chain import UNCHAINED, check_chain
from qeval.store.rows import RowStore
from qeval.store.run import ProtocolRecord, RunRecord, ScoreRecord, TaskRecord, VariantRecord, read_run
from qeval.store.trace_records import GrammarRecord, ReasoningRecord

_CACHED_ROWS = 2_000_000
"""Token rows of variants that are kept at most: some 60 bytes each."""


class PairedRun:
    """A run folder: its record, and one model's rows at a time, checked against the baseline's.

    Answers are kept, and so are the baseline's token rows, and of the variants' as many as `_CACHED_ROWS` allow; others
    are made anew each time, so that only one is held beside them.
    """

    reference: "PairedRun | None" = None
    """The run whose rows take the baseline's place; None: the baseline's own do."""

    def __init__(self, folder: Path, columns: Sequence[str] = align.TOKEN_COLUMNS, *, is_running: bool = False) -> None:
        """Read the record and walk its chain; rows are read on demand, tokens with `columns` alone.

        Args:
            folder: The run's folder.
            columns: What of a token row is read.
            is_running: Whether this process is the one that works on the run, so that it may look before the end.

        Raises:
            UsageError: `folder` holds no run.
            BrokenRecordError: its record is torn or of another version, a command began to write into the folder and
                did not finish, or a file is not the one that the record names.
        """
        self.folder = folder
        if not is_running:
            check_finished(folder)
        self.record: RunRecord = comparable(read_run(folder))
        if self.record.chain is not None:
            check_chain(folder, self.record)
        self._store, self._columns = RowStore(folder), columns
        self._items: dict[tuple[str, str], ItemRows] = {}
        self._tokens: dict[str, TokenRows] = {}
        self._scores: dict[tuple[str, str], ScoreRows] = {}
        self._traces: dict[str, TraceRows] = {}

    @property
    def missing_chain(self) -> str | None:
        """A sentence about a run of an older qeval, whose record vouches for none of its files; None for others."""
        return (
            None
            if self.record.chain is not None
            else f"Nothing vouches for the run in '{self.folder.name}': {UNCHAINED}"
        )

    @property
    def done(self) -> list[VariantRecord]:
        """The variants that have rows."""
        return [variant for variant in self.record.variants if variant.status == "done"]

    @property
    def protocol(self) -> ProtocolRecord | None:
        """The protocol of the token rows; None where the run has none."""
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
        elif self.record.needle:
            table = self._needle_table
        elif self.traced:
            table = self._trace_table
        elif self.record.scores:
            table = self._score_table
        else:
            return None
        rows = align.select(table, BASELINE_NAME, None)
        backends: list[str] = pc.unique(rows["backend"].cast(pa.string())).to_pylist()
        return backends[0] if backends else None

    @property
    def traced(self) -> dict[str, ReasoningRecord | GrammarRecord]:
        """The records of the tasks along traces, by the task."""
        records = {"reasoning": self.record.reasoning, "grammar": self.record.grammar}
        return {task: record for task, record in records.items() if record is not None}

    def variant(self, name: str) -> VariantRecord:
        """Return the record of a variant.

        Raises:
            UsageError: the run has none of that name; the nearest are listed.
            BrokenRecordError: it failed, so it has no rows.
        """
        by_name = {variant.name: variant for variant in self.record.variants}
        if name not in by_name:
            raise unknown(f"variant of the run '{self.folder}'", name, by_name)
        if by_name[name].status != "done":
            raise BrokenRecordError(f"'{name}' failed in this run and has no rows: {by_name[name].error}")
        return by_name[name]

    @cached_property
    def baseline_tokens(self) -> TokenRows:
        """The baseline's token rows, as many as the run says it scored."""
        rows = align.token_rows(align.select(self._token_table, BASELINE_NAME, None), BASELINE_NAME)
        if self.protocol:
            align.check_protocol(rows, self.protocol)
        return replace(rows, stretches=window_clusters(rows.windows, rows.tokens, self.protocol))

    def tokens(self, variant: VariantRecord) -> TokenRows:
        """Return a variant's token rows, on the baseline's tokens."""
        name = variant.name
        if name in self._tokens:
            return self._tokens[name]
        rows = align.token_rows(align.select(self._token_table, name, variant.backend), name)
        align.pair_tokens(rows, self.baseline_tokens, name)
        rows = replace(rows, stretches=self.baseline_tokens.stretches)
        if self.protocol and "kl" in self.record.metrics:
            align.check_kl(rows, self.protocol, name)
        if len(rows.windows) * (len(self._tokens) + 1) <= _CACHED_ROWS:
            self._tokens[name] = rows
        return rows

    def baseline_items(self, task: TaskRecord) -> ItemRows:
        """Return the baseline's answers to a task's questions."""
        key = task.name, BASELINE_NAME
        if key not in self._items:
            rows = align.select(self._item_table, BASELINE_NAME, None)
            self._items[key] = align.item_rows(rows, task, BASELINE_NAME)
        return self._items[key]

    def items(self, task: TaskRecord, variant: VariantRecord) -> ItemRows:
        """Return a variant's answers to a task's questions, which are the baseline's."""
        key, baseline = (task.name, variant.name), self.baseline_items(task)
        if key not in self._items:
            rows = align.select(self._item_table, variant.name, variant.backend)
            paired = align.item_rows(rows, task, variant.name, baseline)
            align.pair_items(paired, baseline, task.name, variant.name)
            self._items[key] = paired
        return self._items[key]

    @cached_property
    def distinct_rows(self) -> align.Mask:
        """The token rows whose text stands nowhere before them, [rows]."""
        rows = self.baseline_tokens
        return is_first_text(rows.windows, rows.clusters_of_rows, self.protocol)

    @property
    def windows_are_apart(self) -> bool:
        """Return whether each window is an observation of its own: none overlaps with others."""
        return self.protocol is None or self.protocol.stride >= self.protocol.window

    @cached_property
    def repeat_notes(self) -> list[str]:
        """Sentences on windows and questions that are no independent observations."""
        notes: list[str] = []
        if self.protocol:
            rows = self.baseline_tokens
            notes += window_notes(rows.windows, rows.clusters_of_rows, self.protocol)
        for task in self.record.tasks:
            notes += question_notes(task.title, self.baseline_items(task).prompts) if task.items else []
        return notes

    @cached_property
    def baseline_drift(self) -> DriftRows:
        """The baseline's greedy continuations."""
        assert self.record.drift is not None
        rows = align.select(self._drift_table, BASELINE_NAME, None)
        return align.drift_rows(rows, self.record.drift, BASELINE_NAME)

    def drift(self, variant: VariantRecord) -> DriftRows:
        """Return a variant's rows along the baseline's continuations."""
        baseline = self.baseline_drift
        assert self.record.drift is not None
        rows = align.select(self._drift_table, variant.name, variant.backend)
        paired = align.drift_rows(rows, self.record.drift, variant.name)
        align.pair_drift(paired, baseline, variant.name)
        return paired

    @cached_property
    def baseline_needles(self) -> NeedleRows:
        """The baseline's answers to needles."""
        assert self.record.needle is not None
        return needle_rows(align.select(self._needle_table, BASELINE_NAME, None), self.record.needle, BASELINE_NAME)

    def needles(self, variant: VariantRecord) -> NeedleRows:
        """Return a variant's answers to the baseline's needles."""
        assert self.record.needle is not None
        rows = align.select(self._needle_table, variant.name, variant.backend)
        paired = needle_rows(rows, self.record.needle, variant.name)
        pair_needles(paired, self.baseline_needles, variant.name)
        return paired

    def baseline_traces(self, task: str) -> TraceRows:
        """Return the baseline's rows along its own traces of a task."""
        if task not in self._traces:
            rows = align.select(self._trace_table, BASELINE_NAME, None)
            self._traces[task] = trace_rows(rows, task, self.traced[task], BASELINE_NAME)
        return self._traces[task]

    def traces(self, task: str, variant: VariantRecord) -> TraceRows:
        """Return a variant's rows along the baseline's traces of a task."""
        rows = align.select(self._trace_table, variant.name, variant.backend)
        paired = trace_rows(rows, task, self.traced[task], variant.name)
        pair_traces(paired, self.baseline_traces(task), task, variant.name)
        return paired

    def baseline_scores(self, score: ScoreRecord) -> ScoreRows:
        """Return the baseline's scores of one kind, which another program gave."""
        key = score.name, BASELINE_NAME
        if key not in self._scores:
            rows = align.select(self._score_table, BASELINE_NAME, None)
            self._scores[key] = score_rows(rows, score, BASELINE_NAME)
        return self._scores[key]

    def scores(self, score: ScoreRecord, variant: VariantRecord) -> ScoreRows:
        """Return a variant's scores of one kind, of the baseline's items."""
        key, baseline = (score.name, variant.name), self.baseline_scores(score)
        if key not in self._scores:
            rows = align.select(self._score_table, variant.name, variant.backend)
            paired = score_rows(rows, score, variant.name)
            pair_scores(paired, baseline, score.name, variant.name)
            self._scores[key] = paired
        return self._scores[key]

    @cached_property
    def _score_table(self) -> pa.Table:
        return self._store.read("scores")

    @cached_property
    def _needle_table(self) -> pa.Table:
        return self._store.read("needle")

    @cached_property
    def _drift_table(self) -> pa.Table:
        return self._store.read("drift")

    @cached_property
    def _trace_table(self) -> pa.Table:
        return self._store.read("traces")

    @cached_property
    def _token_table(self) -> pa.Table:
        return self._store.read("tokens", self._columns)

    @cached_property
    def _item_table(self) -> pa.Table:
        return self._store.read("items")


def comparable(record: RunRecord) -> RunRecord:
    """Return the record with every variant failed that was not asked exactly what the baseline was."""
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
