"""The run's ledger: who may work on what, what a dead process leaves, and what becomes of a torn file."""

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qeval.errors import QevalError, UsageError
from qeval.executors.local import claimed, run_jobs
from qeval.files import database
from qeval.files.database import is_network
from qeval.files.process_id import Owner, is_alive, this_process, token_is_alive
from qeval.identity import digest_file
from qeval.store import ledger as module
from qeval.store.ledger import LEDGER, JobId, join_ledger, read_ledger

ONE, TWO = JobId("tokens", "k1", "rtn"), JobId("tokens", "k2", "rtn")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module.Ledger, "pause", staticmethod(lambda: time.sleep(0.01)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def fail(sentence):
    raise AssertionError(sentence)


@contextmanager
def member(out, owner=None, *, crew=None, settings="s", waiting=fail, warn=fail):
    """A process of the run; `owner` stands for another one than this."""
    with pytest.MonkeyPatch.context() as patch:
        if owner is not None:
            patch.setattr(module, "this_process", lambda: owner)
        stack = ExitStack()
        ledger = stack.enter_context(
            join_ledger(out, settings, "qeval compare", warn, waiting=waiting, command_id=crew)
        )
    with stack:
        yield ledger


@pytest.fixture
def other():
    """Another process of this host that lives until the test's end."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    import psutil

    yield Owner(this_process().host, process.pid, psutil.Process(process.pid).create_time())
    process.kill()
    process.wait()
    process.stdin.close()


DEAD = Owner(this_process().host, 2**22 - 1, 1.0)
FAR = Owner("far/away", 1, 1.0)


def write(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(name)
    return folder / name


def test_owners_are_known_by_number_and_start(other):
    me = this_process()
    assert is_alive(me) is is_alive(other) is True
    assert is_alive(Owner(me.host, me.pid, me.started - 100)) is is_alive(DEAD) is False
    assert is_alive(FAR) is token_is_alive(FAR.token) is None
    assert (token_is_alive(me.token), token_is_alive(DEAD.token)) == (True, False)
    assert str(me) == f"process {os.getpid()} on {me.host.partition('/')[0]}"


def test_a_job_has_one_process_at_a_time(out, other):
    with member(out) as mine, member(out, other) as theirs:
        assert mine.claim(ONE)
        assert mine.claim(ONE)
        assert not theirs.claim(ONE)
        assert mine.at_work() == []
        assert theirs.claim(TWO)
        assert mine.at_work() == [str(other)]
        mine.release(ONE, "stopped")
        assert theirs.claim(ONE)


def test_a_claim_goes_with_its_process(out, other):
    with member(out) as mine:
        with member(out, other) as theirs:
            assert theirs.claim(ONE)
            theirs.begin(ONE)
        assert mine.claim(ONE)
        assert [attempt.outcome for attempt in mine.attempts()] == ["stopped"]
        assert not mine.others


def test_a_dead_process_loses_its_claims_and_its_try_is_told(out):
    with member(out) as mine, member(out, DEAD) as theirs:
        assert theirs.claim(ONE)
        theirs.begin(ONE)
        assert mine.claim(ONE)
        (attempt,) = mine.attempts()
        assert (attempt.outcome, attempt.owner) == ("died", str(DEAD))
        assert mine.given_up(ONE) is None  # it was of another command


def test_another_hosts_claim_holds_while_its_heart_beats(out, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "_BEAT_SECONDS", 1e9)
    with member(out) as mine, member(out, FAR) as theirs:
        assert theirs.claim(ONE)
        for _ in range(3):
            assert not mine.claim(ONE)
            clock[0] += module.LEASE_SECONDS - 1
            theirs.beat()
        assert not mine.claim(ONE)
        clock[0] += module.LEASE_SECONDS + 1
        assert mine.claim(ONE)
        assert not mine.others
        theirs.beat()
        assert mine.others  # it was alive after all


def test_heartbeats_come_by_themselves(out, monkeypatch):
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.01)
    with member(out):
        until = time.monotonic() + 20
        while time.monotonic() < until and beats(out) < 3:
            time.sleep(0.01)
        assert beats(out) >= 3


def beats(out):
    connection = sqlite3.connect(out / LEDGER)
    (found,) = connection.execute("SELECT max(beat) FROM owners").fetchone()
    connection.close()
    return found


def test_other_settings_wait_and_say_for_whom(out, other):
    told = []

    def leave(sentence):
        told.append(sentence)
        stack.close()

    stack = ExitStack()
    stack.enter_context(member(out, other, settings="theirs"))
    with member(out, settings="mine", waiting=leave) as mine:
        assert not mine.others
    assert told == [f"Waiting for {other}, which writes into {out} with other settings: qeval compare"]


class WritingJob:
    """A job that writes a few bytes, or whatever `run` does."""

    units = 3

    def __init__(self, path, ticket, run):
        self.path, self.id = path, ticket
        self.run = run or self.write

    def find(self):
        return self.path if self.path.exists() else None

    def write(self, advance):
        advance(self.units)
        return write(self.path.parent, self.path.name)


def job(out, ticket, run=None):
    return WritingJob(out / "rows" / ticket.kind / f"{ticket.key}.parquet", ticket, run)


def test_finished_jobs_are_found_and_kept_with_their_sha256(out):
    done = []
    jobs = [job(out, ONE), job(out, TWO)]
    write(out / "rows/tokens", "k2.parquet")
    with member(out) as mine:
        records = run_jobs(jobs, mine, done.append)
        assert records == [out / "rows/tokens/k1.parquet", out / "rows/tokens/k2.parquet"]
        assert run_jobs(jobs, mine, done.append) == records
        assert [(each.file, each.sha256) for each in mine.finished()] == [
            (path.name, digest_file(path)) for path in records
        ]
        assert [(attempt.key, attempt.outcome) for attempt in mine.attempts()] == [("k1", "done")]
    assert done == [3] * 4


def test_a_record_that_is_gone_is_made_again(out):
    with member(out) as mine:
        for _ in range(2):
            run_jobs([job(out, ONE)], mine, lambda done: None)
            (out / "rows/tokens/k1.parquet").unlink()
        assert len(mine.attempts()) == 2


def test_what_another_is_at_is_left_or_waited_for(out, other, monkeypatch):
    with member(out) as mine, member(out, other) as theirs:
        assert theirs.claim(ONE)
        assert run_jobs([job(out, ONE), job(out, TWO)], mine, lambda done: None, wait=False)[0] is None

        def finished():
            theirs.finish(ONE, write(out / "rows/tokens", "k1.parquet"))

        monkeypatch.setattr(module.Ledger, "pause", staticmethod(finished))
        assert None not in run_jobs([job(out, ONE), job(out, TWO)], mine, lambda done: None)
        assert [attempt.key for attempt in mine.attempts()] == ["k2"]


def test_jobs_that_are_run_together_are_claimed_for_the_length_of_a_block(out, other):
    jobs = [job(out, ONE), job(out, TWO)]
    with member(out) as mine, member(out, other) as theirs:
        with claimed(jobs, mine) as own:
            assert own == jobs
            assert not theirs.claim(ONE)
            assert None not in run_jobs(jobs[:1], mine, lambda done: None)
        assert theirs.claim(TWO)
        mine.withdraw(TWO)  # another's claim is not its to give back
        assert not mine.claim(TWO)
        with claimed(jobs, mine) as own:  # one is done, and another process is at the other
            assert own == []


def test_who_made_a_record_that_another_found_has_done_it_though_it_is_stopped_before_it_can_say_so(out, other):
    with member(out) as mine, member(out, other) as theirs:
        assert theirs.claim(ONE)
        theirs.begin(ONE)
        write(out / "rows/tokens", "k1.parquet")
        run_jobs([job(out, ONE)], mine, lambda done: None)
        theirs.release(ONE, "stopped")
        assert [(attempt.key, attempt.outcome) for attempt in mine.attempts()] == [("k1", "done")]
        assert [each.key for each in mine.finished()] == ["k1"]


def raising(error):
    def run(advance):
        raise error

    return run


@pytest.mark.parametrize("error", [QevalError("no"), RuntimeError("no"), UsageError("no"), KeyboardInterrupt()])
def test_a_failure_is_raised_as_it_is_where_nobody_else_can_try(out, error):
    with member(out) as mine:
        with pytest.raises(type(error)):
            run_jobs([job(out, ONE, raising(error))], mine, lambda done: None)
        outcome = "failed" if type(error) in (QevalError, RuntimeError) else "stopped"
        assert [attempt.outcome for attempt in mine.attempts()] == [outcome]
    with member(out) as again:  # another command may try again
        assert None not in run_jobs([job(out, ONE)], again, lambda done: None)


def test_a_failed_job_is_tried_once_elsewhere(out, other):
    with member(out, crew="c") as mine, member(out, other, crew="c") as theirs:
        assert run_jobs([job(out, ONE, raising(QevalError("no")))], mine, lambda done: None, wait=False) == [None]
        assert run_jobs([job(out, ONE)], mine, lambda done: None, wait=False) == [None]  # not here again
        assert None not in run_jobs([job(out, ONE)], theirs, lambda done: None)
        assert None not in run_jobs([job(out, ONE)], mine, lambda done: None)


def test_a_job_that_fails_twice_fails_for_all(out, other):
    with member(out, crew="c") as mine, member(out, other, crew="c") as theirs:
        run_jobs([job(out, ONE, raising(QevalError("first")))], mine, lambda done: None, wait=False)
        with pytest.raises(QevalError, match="second"):
            run_jobs([job(out, ONE, raising(QevalError("second")))], theirs, lambda done: None)
        with pytest.raises(QevalError, match="second"):
            run_jobs([job(out, ONE)], mine, lambda done: None)


def test_a_job_that_kills_two_processes_is_given_up(out, other):
    ends = "the process that ran it ended without a word"
    with member(out, crew="c") as mine, ExitStack() as stack:
        for number in (1, 2):
            dead = Owner(DEAD.host, DEAD.pid - number, 1.0)
            theirs = stack.enter_context(member(out, dead, crew="c"))
            assert theirs.claim(ONE)
            theirs.begin(ONE)
        with pytest.raises(QevalError, match=ends):
            run_jobs([job(out, ONE)], mine, lambda done: None)


def test_a_signal_between_begin_and_its_try_leaves_no_attempt_running(out):
    """The transaction is open then; the next one rolls it back, where it once failed and 'running' stayed."""
    with pytest.raises(KeyboardInterrupt), member(out) as ledger:
        assert ledger.claim(ONE)
        ledger.begin(ONE)
        ledger._connection.execute("BEGIN IMMEDIATE")
        raise KeyboardInterrupt
    with read_ledger(out) as ledger:
        assert [attempt.outcome for attempt in ledger.attempts()] == ["stopped"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a database, but text" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(4096) + path.read_bytes()[8192:]),
        lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 99").connection.close(),
    ],
)
def test_a_broken_ledger_is_named_and_begun_anew(out, damage):
    with member(out) as mine:
        run_jobs([job(out, ONE)], mine, lambda done: None)
    damage(out / LEDGER)
    with pytest.raises(QevalError, match="torn"), read_ledger(out):
        pass
    told = []
    with member(out, warn=told.append) as mine:
        run_jobs([job(out, ONE), job(out, TWO)], mine, lambda done: None)
        assert [each.key for each in mine.finished()] == ["k1", "k2"]
        assert [attempt.key for attempt in mine.attempts()] == ["k2"]
    (sentence,) = told
    assert sentence.startswith(f"{out / LEDGER} is torn or of another version (")
    assert sentence.endswith("It is begun anew; finished records are kept.")


def test_a_ledger_that_stays_locked_is_told(out, monkeypatch):
    with member(out) as mine:
        monkeypatch.setattr(database, "_BUSY_SECONDS", 0.05)
        blocker = sqlite3.connect(out / LEDGER, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        mine._connection.execute("PRAGMA busy_timeout = 50")
        with pytest.raises(QevalError, match=r"ledger\.sqlite was locked for .* give an --out on a local disk\."):
            mine.claim(ONE)
        blocker.execute("ROLLBACK")
        blocker.close()
        assert mine.claim(ONE)


def test_wal_on_local_disks_and_a_journal_on_network_folders(out, monkeypatch, tmp_path):
    assert is_network(Path("/data/run"), [("/", "ext4"), ("/data", "nfs4")])
    assert not is_network(Path("/data/run"), [("/", "nfs"), ("/data", "xfs")])
    assert not is_network(Path("/database"), [("/", "ext4"), ("/data", "nfs")])
    for network, mode in ((False, "wal"), (True, "delete")):
        monkeypatch.setattr(database, "is_network", lambda path, found=network: found)
        with member(tmp_path / mode) as mine:
            assert mine._connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
            assert mine.claim(ONE)
