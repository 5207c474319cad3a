"""A variant against itself in an earlier run, whose rows take the baseline's place: what changed since then."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from qeval.errors import BrokenRecordError, UsageError, unknown
from qeval.report.align import ItemRows, TokenRows
from qeval.report.run_rows import PairedRun
from qeval.report.score_rows import ScoreRows
from qeval.store.run import ScoreRecord, TaskRecord

_Record = TypeVar("_Record", TaskRecord, ScoreRecord)


class ReferencedRun(PairedRun):
    """One variant's rows of a run, paired with those of the same variant in a reference run."""

    def __init__(self, folder: Path, reference: PairedRun, variant: str) -> None:
        """Read the record of the run in `folder`.

        Args:
            folder: The run's folder.
            reference: The earlier run.
            variant: The name of the variant in both.

        Raises:
            UsageError: The reference has no such variant, or was asked something else: the token hashes differ.
            BrokenRecordError: A run is broken, or vouches for nothing.
        """
        super().__init__(folder)
        if reference.missing_chain:
            raise BrokenRecordError(reference.missing_chain)
        if self.record.witness != reference.record.witness or self.record.witness is None:
            raise UsageError(
                f"'{folder}' was not asked what '{reference.folder}' was: their token hashes are {self.record.witness} "
                f"and {reference.record.witness}."
            )
        self.reference, self._earlier = reference, reference.variant(variant)

    @cached_property
    def baseline_tokens(self) -> TokenRows:
        """The reference's token rows."""
        assert self.reference is not None
        return self.reference.tokens(self._earlier)

    def baseline_items(self, task: TaskRecord) -> ItemRows:
        """Return the reference's answers to a task's questions."""
        assert self.reference is not None
        earlier = self._named("task", task.name, self.reference.record.tasks)
        return self.reference.items(earlier, self._earlier)

    def baseline_scores(self, score: ScoreRecord) -> ScoreRows:
        """Return the reference's scores of one kind."""
        assert self.reference is not None
        earlier = self._named("score", score.name, self.reference.record.scores)
        return self.reference.scores(earlier, self._earlier)

    def _named(self, kind: str, name: str, records: Sequence[_Record]) -> _Record:
        """Return the reference's record of a name."""
        assert self.reference is not None
        by_name = {record.name: record for record in records}
        if name not in by_name:
            raise unknown(f"{kind} of the run '{self.reference.folder}'", name, by_name)
        return by_name[name]
