"""The errors that a user sees: one clear sentence each, with the exit code that belongs to it.

Exit codes: 0 done, 1 a gate failed, 2 wrong use (what the user gave is wrong), 3 a failure while running,
4 a gate could not decide.
"""

from collections.abc import Iterable
from difflib import get_close_matches

_LISTED_AT_MOST = 40
"""Of more names than this (MMLU has 57 subjects) only the nearest are told."""


class QevalError(Exception):
    """A failure while running, told in one sentence."""

    exit_code = 3


class UsageError(QevalError):
    """What the user gave is wrong: the sentence says what, where, and what to do."""

    exit_code = 2


class BrokenRecordError(QevalError):
    """A stored record is torn, foreign or changed; the sentence names the file."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that no table holds, with the nearest names listed.

    >>> str(unknown("method", "rtm", ["rtn", "awq"]))
    "Unknown method 'rtm'; nearest: rtn. Choices: awq, rtn."
    >>> str(unknown("task", "KL", ["kl", "ppl"]))
    "Unknown task 'KL'; nearest: kl. Choices: kl, ppl."
    """
    known = sorted(choices)
    listed = f"Choices: {', '.join(known)}." if len(known) <= _LISTED_AT_MOST else f"There are {len(known)} choices."
    spelled = {choice.lower(): choice for choice in known}
    near = [spelled[found] for found in get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return UsageError(f"Unknown {kind} '{name}'{hint}. {listed}")
