"""Commands that began to write into a run's folder and did not finish: `OUT/unfinished/OWNER.json`, one a process.

The file is there before anything else of the command is written, and goes when its record has taken the old one's
place. While one is there, the record beside it may be an earlier command's, so nobody takes a verdict from it.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from qeval.errors import BrokenRecordError
from qeval.files.atomic import write_text
from qeval.files.process_id import this_process, token_is_alive

UNFINISHED = "unfinished"
_NAME = re.compile(r"[0-9a-f]{8}-\d+-\d+")


class UnfinishedCommand(NamedTuple):
    """A command that has not finished; `alive`: whether its process still runs, None where that can't be seen."""

    path: Path
    command: str
    started: str
    alive: bool | None


@contextmanager
def attempt(out: Path, command: str) -> Iterator[None]:
    """Mark the run in `out` as begun while the block lasts, and after it where it is left by an exception.

    Raises:
        QevalError: The mark can't be written.
    """
    begin(out, command)
    yield
    finish(out)


def begin(out: Path, command: str) -> None:
    """Mark the run in `out` as begun by this process, or as begun now where it was marked before.

    Raises:
        QevalError: The mark can't be written.
    """
    write_text(
        _mark_of_this_process(out), json.dumps({"command": command, "started": datetime.now(UTC).isoformat()}) + "\n"
    )


def finish(out: Path) -> None:
    """Take off this process's mark, and those that it makes up for: of dead processes, and older ones elsewhere."""
    mine = _mark_of_this_process(out)
    began = mine.stat().st_mtime_ns if mine.exists() else 0
    for path in _marks(out):
        alive = token_is_alive(path.stem)
        if path == mine or alive is False or (alive is None and path.stat().st_mtime_ns <= began):
            path.unlink(missing_ok=True)
    withdraw(out)


def withdraw(out: Path) -> None:
    """Take off this process's mark alone: it finished, or wrote nothing."""
    _mark_of_this_process(out).unlink(missing_ok=True)
    folder = out / UNFINISHED
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def unfinished(out: Path) -> list[UnfinishedCommand]:
    """Return the commands that began to write into `out` and did not finish, the oldest first."""
    return sorted((_read(path) for path in _marks(out)), key=lambda attempt: attempt.started)


def unfinished_sentence(out: Path) -> str | None:
    """Return why nothing in `out` can be taken for a finished run; None where no command is unfinished."""
    attempts = unfinished(out)
    if not attempts:
        return None
    last = attempts[-1]
    state = "is at work in it" if last.alive else "began to write into it and did not finish"
    return (
        f"'{out}' is no finished run: {last.command or 'another command'} {state} (since {last.started}). Run that "
        "command to its end; what is done is kept."
    )


def check_finished(out: Path) -> None:
    """Refuse a folder that a command began to write into and did not finish.

    Raises:
        BrokenRecordError: It names the command.
    """
    if sentence := unfinished_sentence(out):
        raise BrokenRecordError(sentence)


def has_marks(out: Path) -> bool:
    """Return whether a command of qeval's began to write into a folder."""
    return bool(_marks(out))


def _mark_of_this_process(out: Path) -> Path:
    return out / UNFINISHED / f"{this_process().token}.json"


def _marks(out: Path) -> list[Path]:
    return [path for path in (out / UNFINISHED).glob("*.json") if _NAME.fullmatch(path.stem)]


def _read(path: Path) -> UnfinishedCommand:
    """Return what a mark says; one that is torn is a mark all the same."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        command, started = _short(str(data["command"])), str(data["started"])
    except (OSError, ValueError, KeyError, TypeError):
        command, started = "", ""
    return UnfinishedCommand(path, command, started, token_is_alive(path.stem))


def _short(command: str) -> str:
    """Return a command without what it was given, which may name places of the machine.

    >>> _short("qeval compare --model /home/me/model"), _short("qeval.compare(model='/home/me/model')")
    ('qeval compare', 'qeval.compare()')
    """
    if command.startswith("qeval."):
        return f"{command.partition('(')[0]}()"
    return " ".join(shlex.split(command)[:2])
