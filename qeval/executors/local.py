"""Jobs in this process, one after the other. A finished job's record is found by its key and not made again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qeval.progress import Advance


@dataclass(frozen=True)
class Job:
    """A piece of work that ends in one record.

    `find` gives the record if it is there already; `run` makes it and tells `advance` of `units` in all.
    """

    units: int
    find: Callable[[], Path | None]
    run: Callable[[Advance], Path]


def run_jobs(jobs: Iterable[Job], advance: Advance) -> list[Path]:
    """The records of all jobs, in order; only what is missing is run."""
    records = []
    for job in jobs:
        record = job.find()
        if record is None:
            record = job.run(advance)
        else:
            advance(job.units)
        records.append(record)
    return records
