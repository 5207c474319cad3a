"""The errors that a user sees: one clear sentence each, with the exit code that belongs to it.

Exit codes: 0 done, 1 a gate failed, 2 wrong use (what the user gave is wrong), 3 a failure while running,
4 a gate could not decide.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from qeval.escape import cut_text

_LONGEST_LINE = 500
"""Letters of an error that nobody foresaw."""
_LONGEST_NAME = 120
_LISTED_AT_MOST = 40
"""Of more names than this (MMLU has 57 subjects) only the nearest are told."""

_NO_MEMORY = re.compile(
    r"allocate memory|out of memory|not enough memory|bad_alloc|OUT_OF_?MEMORY|CU(BLAS|DNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class QevalError(Exception):
    """A failure while running, told in one sentence."""

    exit_code = 3


class UsageError(QevalError):
    """A fault in what the user gave: the sentence says what, where, and what to do."""

    exit_code = 2


class BrokenRecordError(QevalError):
    """A stored record is torn, foreign or changed; the sentence names the file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, in the words of torch, CUDA's libraries and ONNX Runtime.

    torch raises a plain RuntimeError on the CPU, and ONNX Runtime its own exceptions: the message alone tells.
    """
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Return the error for a name that no table holds, with the nearest names listed.

    >>> str(unknown("method", "rtm", ["rtn", "awq"]))
    "Unknown method 'rtm'; nearest: rtn. Choices: awq, rtn."
    >>> str(unknown("task", "KL", ["kl", "ppl"]))
    "Unknown task 'KL'; nearest: kl. Choices: kl, ppl."
    """
    name = cut_text(name, _LONGEST_NAME)
    known = sorted(choices)
    listed = f"Choices: {', '.join(known)}." if len(known) <= _LISTED_AT_MOST else f"There are {len(known)} choices."
    spelled = {choice.lower(): choice for choice in known}
    near = [spelled[match] for match in get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return UsageError(f"Unknown {kind} '{name}'{hint}. {listed}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its type's name where it has none.

    >>> first_line(ValueError("  no such file.  see the docs")), first_line(KeyError())
    ('no such file.  see the docs', 'KeyError')
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def in_a_line(error: BaseException) -> str:
    """Return what went wrong: with a file, which and what of it; else the error's name and its words in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"Cannot use {error.filename}: {error.strerror}."
    if isinstance(error, MemoryError):
        return "There is not enough memory for this; give a smaller model, batch or window, or --stream."
    return f"{type(error).__name__}: {cut_text(' '.join(str(error).split()), _LONGEST_LINE)}"
