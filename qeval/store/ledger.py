"""The run's ledger, `OUT/ledger.sqlite`: which process works on which job, so that several may work on one run.

It saves work and guards no truth: what is finished is what lies on disk as a record that names its own checksum. A
ledger that is lost or torn is named and begun anew, and its rows come back as the records are met. A claim whose
process is dead is taken over: at once where the process can be seen (this host), and after a lease without a heartbeat
where it can't (another one). A heartbeat is a count, watched by the watcher's own clock: hosts need not agree on the
time.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple
from uuid import uuid4

from qeval.errors import QevalError
from qeval.files.database import connect, database_errors, find_damage, open_database, open_for_reading
from qeval.files.process_id import Owner, is_alive, this_process
from qeval.identity import digest_file
from qeval.progress import Notify

LEDGER = "ledger.sqlite"
LEDGER_VERSION = 1
LEASE_SECONDS = 60.0
"""How long a claim of another host's process holds without a heartbeat."""

_BEAT_SECONDS = 2.0
_SCHEMA = """
CREATE TABLE owners(id INTEGER PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL,
    crew TEXT NOT NULL, settings TEXT NOT NULL, command TEXT NOT NULL, beat INTEGER NOT NULL, gone INTEGER NOT NULL);
CREATE TABLE jobs(kind TEXT NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL, owner INTEGER REFERENCES owners(id),
    file TEXT, sha256 TEXT, PRIMARY KEY(kind, key));
CREATE TABLE attempts(kind TEXT NOT NULL, key TEXT NOT NULL, owner INTEGER NOT NULL REFERENCES owners(id),
    began REAL NOT NULL, ended REAL, outcome TEXT NOT NULL, error TEXT);
"""
_TRIES = 2
"""How often one command tries a job that fails, each time in another process."""


@dataclass(frozen=True)
class JobId:
    """A job as the ledger knows it: a kind and key that name its record, and the model that it is about."""

    kind: str
    key: str
    name: str


class JobAttempt(NamedTuple):
    """One try of a job; `outcome` is `running`, `done`, `failed`, `stopped` or `died`. Times are seconds since 1970."""

    kind: str
    key: str
    name: str
    owner: str
    outcome: str
    error: str | None
    began: float
    ended: float | None


class Finished(NamedTuple):
    """A finished job's record: the file's name and its whole sha256."""

    kind: str
    key: str
    file: str
    sha256: str


class Ledger:
    """One process's view of a run's ledger; `join_ledger` makes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, command_id: str) -> None:
        """`command_id` names the processes that one command started; a job's failures are counted within them."""
        self.path, self._command_id = path, command_id
        self._connection = connection
        self._me = -1
        self._seen: dict[int, tuple[int, float]] = {}

    def enter(self, settings: str, command: str, waiting: Notify) -> None:
        """Put this process down as one that works here; while one with other `settings` does, wait for it."""
        is_announced = False
        while (other := self._entered(settings, command)) is not None:
            if not is_announced:
                waiting(f"Waiting for {other}")
                is_announced = True
            self.pause()

    def leave(self) -> None:
        """Take this process off; what it still claims is free."""
        with self._writing() as run:
            run("UPDATE attempts SET outcome = 'stopped' WHERE owner = ? AND outcome = 'running'", self._me)
            run("UPDATE jobs SET owner = NULL WHERE owner = ?", self._me)
            run("UPDATE owners SET gone = 1 WHERE id = ?", self._me)

    def claim(self, job: JobId) -> bool:
        """Return whether the job is now this process's; not while a live process has it, or this command gave it up."""
        with self._writing() as run:
            rows = run("SELECT owner FROM jobs WHERE kind = ? AND key = ?", job.kind, job.key)
            owner = rows[0][0] if rows else None
            if owner is not None and owner != self._me and self._is_here(run, owner):
                return False
            failures = self._failures(run, job)
            if len(failures) >= _TRIES or any(each == self._me for each, _ in failures):
                return False
            run(
                "INSERT INTO jobs(kind, key, name, owner) VALUES(?, ?, ?, ?) "
                "ON CONFLICT(kind, key) DO UPDATE SET owner = excluded.owner, name = excluded.name",
                job.kind, job.key, job.name, self._me,
            )  # fmt: skip
        return True

    def begin(self, job: JobId) -> None:
        """Note that the claimed job is being run."""
        row = (job.kind, job.key, self._me, time.time())
        with self._writing() as run:
            run("INSERT INTO attempts VALUES(?, ?, ?, ?, NULL, 'running', NULL)", *row)

    def finish(self, job: JobId, record: Path) -> None:
        """Note the job's record, made just now or found on disk; the claim is free."""
        rows = self._read("SELECT file, owner FROM jobs WHERE kind = ? AND key = ?", job.kind, job.key)
        if rows == [(record.name, None)]:
            return
        sha256 = digest_file(record)
        with self._writing() as run:
            run(
                "INSERT INTO jobs VALUES(?, ?, ?, NULL, ?, ?) ON CONFLICT(kind, key) "
                "DO UPDATE SET owner = NULL, name = excluded.name, file = excluded.file, sha256 = excluded.sha256",
                job.kind, job.key, job.name, record.name, sha256,
            )  # fmt: skip
            run(  # by whoever made it, who may be stopped before it can say so
                "UPDATE attempts SET ended = ?, outcome = 'done' WHERE kind = ? AND key = ? AND outcome = 'running'",
                time.time(), job.kind, job.key,
            )  # fmt: skip

    def release(self, job: JobId, outcome: str, error: str | None = None) -> None:
        """Give a claim back: the try ended as `failed` or `stopped`, and why."""
        with self._writing() as run:
            run("UPDATE jobs SET owner = NULL WHERE kind = ? AND key = ?", job.kind, job.key)
            run(
                "UPDATE attempts SET ended = ?, outcome = ?, error = ? "
                "WHERE kind = ? AND key = ? AND owner = ? AND outcome = 'running'",
                time.time(), outcome, error, job.kind, job.key, self._me,
            )  # fmt: skip

    def withdraw(self, job: JobId) -> None:
        """Give back a claim of this process under which nothing was begun."""
        with self._writing() as run:
            run("UPDATE jobs SET owner = NULL WHERE kind = ? AND key = ? AND owner = ?", job.kind, job.key, self._me)

    def given_up(self, job: JobId) -> str | None:
        """Return why no process of this command will run the job (again), or None."""
        with self._writing() as run:
            failures = self._failures(run, job)
            if not failures:
                return None
            tried = {owner for owner, _ in failures}
            others = run("SELECT id FROM owners WHERE crew = ? AND gone = 0", self._command_id)
            untried = any(owner not in tried and self._is_here(run, owner) for (owner,) in others)
        return failures[-1][1] if len(failures) >= _TRIES or not untried else None

    def attempts(self) -> list[JobAttempt]:
        """Return every try of every job, in the order in which they began."""
        query = (
            "SELECT a.kind, a.key, j.name, o.host, o.pid, o.started, a.outcome, a.error, a.began, a.ended "
            "FROM attempts a JOIN owners o ON o.id = a.owner "
            "JOIN jobs j ON j.kind = a.kind AND j.key = a.key ORDER BY a.rowid"
        )
        return [
            JobAttempt(kind, key, name, str(Owner(host, pid, started)), *ended)
            for kind, key, name, host, pid, started, *ended in self._read(query)
        ]

    def finished(self) -> list[Finished]:
        """Return the records of all jobs that ended in one."""
        query = "SELECT kind, key, file, sha256 FROM jobs WHERE file IS NOT NULL ORDER BY kind, key"
        return [Finished(*row) for row in self._read(query)]

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Be the one process of the run that does `what`, after any other that does."""
        job = JobId("alone", what, what)
        while not self.claim(job):
            self.pause()
        try:
            yield
        finally:
            self.release(job, "done")

    @property
    def command_id(self) -> str:
        """The name that the processes of one command share."""
        return self._command_id

    @property
    def others(self) -> bool:
        """Return whether other live processes work on the run."""
        with self._writing() as run:
            rows = run("SELECT id FROM owners WHERE gone = 0 AND id != ?", self._me)
            return any(self._is_here(run, owner) for (owner,) in rows)

    def at_work(self) -> list[str]:
        """Return the other live processes that have claimed jobs."""
        query = (
            "SELECT DISTINCT o.id, o.host, o.pid, o.started FROM owners o JOIN jobs j ON j.owner = o.id ORDER BY o.id"
        )
        with self._writing() as run:
            owners = [(owner, Owner(*who)) for owner, *who in run(query) if owner != self._me]
            return [str(who) for owner, who in owners if self._is_here(run, owner)]

    def beat(self) -> None:
        """Tell other hosts that this process lives, also those that thought it dead."""
        with self._writing() as run:
            run("UPDATE owners SET beat = beat + 1, gone = 0 WHERE id = ?", self._me)

    @staticmethod
    def pause() -> None:
        """Give others the time to come further."""
        time.sleep(0.1)

    def _entered(self, settings: str, command: str) -> str | None:
        """Return who works here with other settings, or None once this process is put down."""
        me = this_process()
        with self._writing() as run:
            mine = (me.host, me.pid, me.started)
            run("UPDATE owners SET gone = 1 WHERE host = ? AND pid = ? AND started = ?", *mine)  # an earlier run's
            for owner, their_settings, their_command in run("SELECT id, settings, command FROM owners WHERE gone = 0"):
                if their_settings != settings and self._is_here(run, owner):
                    (row,) = run("SELECT host, pid, started FROM owners WHERE id = ?", owner)
                    return f"{Owner(*row)}, which writes into {self.path.parent} with other settings: {their_command}"
            run(
                "INSERT INTO owners(host, pid, started, crew, settings, command, beat, gone) VALUES(?,?,?,?,?,?,0,0)",
                *mine, self._command_id, settings, command,
            )  # fmt: skip
            ((self._me,),) = run("SELECT last_insert_rowid()")
        return None

    def _is_here(self, run: "_Query", owner: int) -> bool:
        """Return whether an owner lives; one that doesn't is noted as gone, and what it was at as died."""
        if owner == self._me:
            return True
        host, pid, started, beat, gone = run("SELECT host, pid, started, beat, gone FROM owners WHERE id = ?", owner)[0]
        if gone:
            return False

        # another host's process lives as long as its beats come
        alive = is_alive(Owner(host, pid, started))
        if alive is None:
            seen, since = self._seen.setdefault(owner, (beat, time.monotonic()))
            if seen != beat:
                self._seen[owner] = (beat, time.monotonic())
            alive = seen != beat or time.monotonic() - since < LEASE_SECONDS

        if not alive:
            ended = "the process that ran it ended without a word"
            run("UPDATE owners SET gone = 1 WHERE id = ?", owner)
            run("UPDATE attempts SET outcome='died', error=? WHERE owner=? AND outcome='running'", ended, owner)
        return alive

    def _failures(self, run: "_Query", job: JobId) -> list[tuple[int, str]]:
        """Return which processes of the command failed on a job, and why."""
        query = (
            "SELECT a.owner, a.error FROM attempts a JOIN owners o ON o.id = a.owner "
            "WHERE a.kind = ? AND a.key = ? AND o.crew = ? AND a.outcome IN ('failed', 'died') ORDER BY a.rowid"
        )
        return [(owner, error) for owner, error in run(query, job.kind, job.key, self._command_id)]

    def _read(self, query: str, *values: Any) -> list[Any]:
        with database_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator["_Query"]:
        """Open a transaction that no other process writes beside."""
        with database_errors(self.path):
            self._roll_back()  # a signal may have come between an earlier BEGIN and its `try`
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield lambda query, *values: self._connection.execute(query, values).fetchall()
            except BaseException:
                self._roll_back()
                raise
            self._connection.execute("COMMIT")

    def _roll_back(self) -> None:
        """Undo the transaction that is open, if one is."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


_Query = Callable[..., list[Any]]
"""Executes a query with its values and gives the rows."""


@contextmanager
def join_ledger(
    out: Path, settings: str, command: str, warn: Notify, *, waiting: Notify, command_id: str | None = None
) -> Iterator[Ledger]:
    """Join the run in `out` as a process that works on it, until the block ends.

    Args:
        out: The run's folder.
        settings: What all who work on one run agree on; a process with others waits until it is alone.
        command: What this process runs, in words.
        warn: Hears of a ledger that is begun anew, and of heartbeats that fail.
        waiting: Hears who is waited for.
        command_id: That of the process that started this one, if any did.

    Raises:
        QevalError: The ledger can't be written, or is locked all the time.
    """
    path = out / LEDGER
    with closing(open_database(path, _SCHEMA, LEDGER_VERSION, warn)) as connection:
        ledger = Ledger(path, connection, command_id or uuid4().hex)
        ledger.enter(settings, command, waiting)
        try:
            with _heartbeats(ledger, warn):
                yield ledger
        except BaseException:
            with suppress(QevalError):  # what went wrong first is what is told; a dead process's claims are free
                ledger.leave()
            raise
        ledger.leave()


@contextmanager
def read_ledger(out: Path) -> Iterator[Ledger]:
    """Open the ledger of a run, to look at.

    Raises:
        FileNotFoundError: There is none. QevalError: it is torn or of another version, or locked.
    """
    path = out / LEDGER
    if not path.is_file():
        raise FileNotFoundError(path)
    with closing(open_for_reading(path)) as connection:
        with database_errors(path):
            reason = find_damage(connection, LEDGER_VERSION)
        if reason:
            raise QevalError(f"{path} is torn or of another version ({reason}).")
        yield Ledger(path, connection, "")


@contextmanager
def _heartbeats(ledger: Ledger, warn: Notify) -> Iterator[None]:
    """Send heartbeats from a thread of their own, so that no batch is too long for them."""
    stop, failed = Event(), list[str]()

    def beat() -> None:
        with closing(connect(ledger.path)) as connection:
            own_ledger = Ledger(ledger.path, connection, "")
            own_ledger._me = ledger._me
            while not stop.wait(_BEAT_SECONDS):
                try:
                    own_ledger.beat()
                except QevalError as error:
                    failed.append(str(error))

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if failed:
            warn(f"{len(failed)} heartbeats failed, so other hosts may have repeated work: {failed[-1]}")
