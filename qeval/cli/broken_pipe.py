"""A reader of stdout that leaves early (`qeval tasks | head -1`) is no failure: the rest goes nowhere, the code stays.

A failed gate must not pass, nor a passed one fail, by who reads its words.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast


class _Leavable:
    """A text stream that goes nowhere once nobody reads it, and is the wrapped stream in everything else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        """Let what the stream still holds, and what is yet to come, be written where it is lost."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Let stdout lose its reader during the block."""
    stdout = cast(TextIO, _Leavable(sys.stdout))
    with redirect_stdout(stdout):
        try:
            yield
        finally:
            stdout.flush()
