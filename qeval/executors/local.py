"""Jobs in this process, one after the other, beside whoever else works on the same run.

A finished job's record is found by its key and not made again. A job is claimed before it is run, so that no two live
processes run it; what others have claimed is left to them, and waited for in the end.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qeval.errors import QevalError, UsageError
from qeval.progress import Advance
from qeval.store.ledger import Ledger, Ticket


@dataclass(frozen=True)
class Job:
    """A piece of work that ends in one record.

    `find` gives the record if it is there already; `run` makes it and tells `advance` of `units` in all.
    """

    ticket: Ticket
    units: int
    find: Callable[[], Path | None]
    run: Callable[[Advance], Path]


def run_jobs(jobs: Sequence[Job], ledger: Ledger, advance: Advance, *, wait: bool = True) -> list[Path | None]:
    """The records of all jobs, in order; only what is missing is run.

    Without `wait` a job that another process is at is left, and has None; with it, its record is waited for, and the
    job taken over should its process die.

    Raises:
        QevalError, RuntimeError: as the job that failed, once nobody else of the crew is left to try it.
    """
    found: list[Path | None] = [None] * len(jobs)
    left = list(range(len(jobs)))
    while left:
        before = len(left)
        for place in left:
            found[place] = _record(jobs[place], ledger, advance)
        left = [place for place in left if found[place] is None]
        if not wait:
            break
        if len(left) == before:
            ledger.pause()
    return found


def _record(job: Job, ledger: Ledger, advance: Advance) -> Path | None:
    """The job's record, found or made; None while another process is at it."""
    record = job.find()
    if record is None and ledger.claim(job.ticket):
        record = job.find()  # whoever had the claim before may have finished it just now
        if record is None:
            return _made(job, ledger, advance)
    if record is None:
        if reason := ledger.given_up(job.ticket):
            raise QevalError(reason)
        return None
    ledger.finish(job.ticket, record)
    advance(job.units)
    return record


def _made(job: Job, ledger: Ledger, advance: Advance) -> Path | None:
    ledger.begin(job.ticket)
    try:
        record = job.run(advance)
    except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
        if isinstance(error, UsageError):
            _release(job, ledger, "stopped")
            raise
        _release(job, ledger, "failed", str(error))
        if ledger.given_up(job.ticket):
            raise
        return None
    except BaseException:
        _release(job, ledger, "stopped")
        raise
    ledger.finish(job.ticket, record)
    return record


def _release(job: Job, ledger: Ledger, outcome: str, error: str | None = None) -> None:
    with suppress(QevalError):  # what stopped the job is what is told; a ledger that can't be written says so next
        ledger.release(job.ticket, outcome, error)
