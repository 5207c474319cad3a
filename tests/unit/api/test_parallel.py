"""Comparisons in processes of their own: what they tell by events, and what becomes of those that end otherwise."""

import os
import time
from contextlib import closing

import pytest

from qeval.api import parallel
from qeval.api.parallel import ComparisonProcess, run_all

EVENTS = """
import json, sys
print("a library's noise")
print(json.dumps({"event": "warning", "message": "slow"}))
print("more on stderr", file=sys.stderr)
"""
DONE = EVENTS + 'print(json.dumps({"event": "done"}))'
FAILED = EVENTS + 'print(json.dumps({"event": "failed", "error": "No such model."})); sys.exit(2)'
KILLED = EVENTS + "import os, signal; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
ENDLESS = "import time; time.sleep(600)"


@pytest.fixture
def start(monkeypatch, tmp_path):
    """What makes a comparison whose process runs some code."""
    monkeypatch.setattr(parallel, "_POLL_SECONDS", 0.02)

    def made(*programs):
        monkeypatch.setattr(parallel, "_WORKER", ("-c", "import sys, json; exec(json.loads(sys.argv[1])['model'])"))
        return [ComparisonProcess(code, tmp_path / str(place), {}) for place, code in enumerate(programs)]

    return made


@pytest.mark.parametrize(
    ("code", "ended", "error", "more"),
    [(DONE, 0, None, []), (FAILED, 3, "No such model.", ["error: No such model."])],
)
def test_how_a_comparison_ended_is_read_from_its_events(start, code, ended, error, more):
    for each in run_all(start(code), 1, os.environ):
        assert (each.code, each.error) == (ended, error)
        assert each.lines() == ["warning: slow", *more, "more on stderr"]
        assert each.state() == ("done" if error is None else f"failed: {error}")


def test_a_process_that_was_killed_is_told_by_its_exit_code(start):
    for each in run_all(start(KILLED), 1, os.environ):
        assert (each.code, each.error) == (3, "it ended with exit code -9")
        assert "warning: slow" in each.lines()


def test_no_more_are_at_work_than_asked_for_and_all_end(start):
    comparisons = start(DONE, FAILED, DONE)
    ended = []
    for each in run_all(comparisons, 2, os.environ):
        ended.append(each)
        assert sum(one.is_running for one in comparisons) <= 2
    assert sorted(ended, key=id) == sorted(comparisons, key=id)


def test_who_leaves_early_leaves_no_process_behind(start):
    comparisons = start(DONE, ENDLESS)
    with closing(run_all(comparisons, 2, os.environ)) as running:
        assert next(running) is comparisons[0]
        assert comparisons[1].state() == "at work, 0 jobs done"
    began = time.monotonic()
    process = comparisons[1]._process
    assert process is not None
    assert process.poll() is not None
    assert time.monotonic() - began < 1
