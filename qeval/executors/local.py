"""Jobs in this process, one after the other, beside whoever else works on the same run.

A finished job's record is found by its key and not made again. A job is claimed before it is run, so that no two live
processes run it; what others have claimed is left to them, and waited for in the end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from qeval.errors import QevalError, UsageError
from qeval.progress import Advance
from qeval.store.ledger import JobId, Ledger


class Job(Protocol):
    """A piece of work that ends in one record."""

    @property
    def id(self) -> JobId:
        """The job as the ledger knows it."""
        ...

    @property
    def units(self) -> int:
        """The units that `run` reports to its `advance`, in all."""
        ...

    def find(self) -> Path | None:
        """Return the record if it is there already."""
        ...

    def run(self, advance: Advance) -> Path:
        """Make the record."""
        ...


_J = TypeVar("_J", bound=Job)


class Share(NamedTuple):
    """The part of the jobs that worker number `place` of `workers` does, where each runs all of its own together."""

    place: int
    workers: int

    def of(self, jobs: Sequence[_J]) -> list[_J]:
        """Return the worker's own jobs: consecutive ones, of about as many units as any other worker's."""
        ends = list(accumulate((job.units for job in jobs), initial=0))
        mine = []
        for job, start, end in zip(jobs, ends, ends[1:], strict=False):
            middle = (start + end) / 2  # a job is its whose part of all units this lies in
            if min(int(middle * self.workers / ends[-1]), self.workers - 1) == self.place:
                mine.append(job)
        return mine


@contextmanager
def claimed(jobs: Sequence[_J], ledger: Ledger) -> Iterator[list[_J]]:
    """Claim all jobs that lack a record and nobody else is at, for the length of the block; those that were claimed.

    Jobs that are run in one go are claimed before it, so that no other process runs them meanwhile.

    Raises:
        QevalError: The crew has given one up.
    """
    mine: list[_J] = []
    try:
        mine.extend(job for job in jobs if _find_or_claim(job, ledger)[1])
        yield mine
    finally:
        with suppress(QevalError):  # a ledger that can't be written says so next
            for job in mine:
                ledger.withdraw(job.id)


def run_jobs(jobs: Sequence[Job], ledger: Ledger, advance: Advance, *, wait: bool = True) -> list[Path | None]:
    """Return the records of all jobs, in order; only what is missing is run.

    Without `wait` a job that another process is at is left, and has None; with it, its record is waited for, and the
    job taken over should its process die.

    Raises:
        QevalError, RuntimeError: as the job that failed, once nobody else of the crew is left to try it.
    """
    records: list[Path | None] = [None] * len(jobs)
    left = list(range(len(jobs)))
    while left:
        before = len(left)
        for place in left:
            job = jobs[place]
            record, is_mine = _find_or_claim(job, ledger)
            if is_mine:
                with _attempt(job, ledger):
                    record = job.run(advance)
            elif record is not None:
                advance(job.units)
            if record is not None:
                ledger.finish(job.id, record)
            records[place] = record
        left = [place for place in left if records[place] is None]
        if not wait:
            break
        if len(left) == before:
            ledger.pause()
    return records


def _find_or_claim(job: Job, ledger: Ledger) -> tuple[Path | None, bool]:
    """Return the job's record if it is there, and whether the job is this process's to run; neither: another is at it.

    Raises:
        QevalError: The crew has given the job up.
    """
    record = job.find()
    if record is None and ledger.claim(job.id):
        record = job.find()  # whoever had the claim before may have finished it just now
        return record, record is None
    if record is None and (reason := ledger.given_up(job.id)):
        raise QevalError(reason)
    return record, False


@contextmanager
def _attempt(job: Job, ledger: Ledger) -> Iterator[None]:
    """Note that a job is run, and how that ends; a failure is left to the others of the crew while any can try it."""
    ledger.begin(job.id)
    try:
        yield
    except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
        if isinstance(error, UsageError):
            _release(job, ledger, "stopped")
            raise
        _release(job, ledger, "failed", str(error))
        if ledger.given_up(job.id):
            raise
    except BaseException:
        _release(job, ledger, "stopped")
        raise


def _release(job: Job, ledger: Ledger, outcome: str, error: str | None = None) -> None:
    with suppress(QevalError):  # what stopped the job is what is told; a ledger that can't be written says so next
        ledger.release(job.id, outcome, error)
