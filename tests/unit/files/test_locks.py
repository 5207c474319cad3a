"""A lock a key of the cache: one process at a time, and none for a dead one."""

import os
import signal
import threading
import time

import pytest

from qeval.errors import QevalError
from qeval.files.locks import alone
from tests.fixtures.kills import CONTEXT


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def hold(home, connection):
    os.environ["QEVAL_HOME"] = home
    with alone("k"):
        connection.send("held")
        time.sleep(60)


def test_a_lock_is_waited_for_and_goes_with_its_process(home):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(str(home), theirs))
    process.start()
    assert ours.recv() == "held"
    told, killed = [], []

    def kill():
        killed.append(time.monotonic())
        os.kill(process.pid, signal.SIGKILL)

    timer = threading.Timer(0.5, kill)
    timer.start()
    with alone("other", told.append):
        assert not told
    with alone("k", told.append):
        assert killed
    assert told == ["Waiting for another process, which makes k."]
    process.join()
    for end in (ours, theirs):
        end.close()


def test_a_lock_is_free_after_a_failure(home):
    with pytest.raises(ValueError, match="no"), alone("k"):
        raise ValueError("no")
    with alone("k", pytest.fail):
        pass


def test_a_cache_that_cannot_be_written_is_a_sentence(home):
    home.write_text("a file")
    with pytest.raises(QevalError, match=r"^Cannot lock .*k\.lock: "), alone("k"):
        pass
