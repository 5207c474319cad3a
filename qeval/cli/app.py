"""The program `qeval`: arguments in, calls, exit codes out.

Exit codes: 0 done, 1 a gate failed, 2 wrong use, 3 a failure while running, 4 a gate could not
decide, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import cast

import typer
import typer.main
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from qeval import __version__, escape
from qeval.cli.broken_pipe import reader_may_leave
from qeval.cli.commands import CommandGroup
from qeval.cli.printing import accept_every_letter, stderr
from qeval.errors import QevalError, UsageError, in_a_line
from qeval.paths import check_text, with_homes

_INTERRUPTED, _TERMINATED = 130, 143
"""Typer makes the first of Ctrl-C."""
_LONGEST_SENTENCE = 4000
"""Letters of an error."""

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Threads that wait give way: spinning at barriers makes torch several times slower on a CPU that others use too."""

app = typer.Typer(
    name="qeval",
    help="What a quantized language model lost against its FP16 original, with error bars.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=CommandGroup,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qeval {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with its code; errors are one sentence on stderr unless --debug is given."""
    sys.exit(run_program(sys.argv[1:] if arguments is None else arguments))


def run_program(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    accept_every_letter(sys.stdout, sys.stderr)
    console = stderr()
    words = list(arguments) or ["--help"]
    command = shlex.join(["qeval", *words])
    signals: list[int] = []
    try:
        check_text(words)
        _check_numbers(words)
        with _signals_as_interrupts() as signals, reader_may_leave():
            code = app(args=with_homes(words), prog_name="qeval", standalone_mode=False, obj=command)
    except typer.TyperException as error:
        sentence = f"{error.format_message()} (--help lists what there is)"
        return _report(console, sentence, UsageError.exit_code, debug=False)
    except QevalError as error:
        if not signals:
            return _report(console, str(error), error.exit_code, debug="--debug" in arguments)
        code = _INTERRUPTED  # a reader of files that was interrupted may take it for the file's fault
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the last resort, a panic of Rust's included, which is no Exception
        debug = "--debug" in arguments
        if not signals:
            where = "" if debug else " (--debug shows where)"
            return _report(console, f"{in_a_line(error)}{where}", QevalError.exit_code, debug=debug)
        code = _INTERRUPTED  # compiled code that was interrupted may make another error of it
    if code == _INTERRUPTED:  # typer makes this of KeyboardInterrupt
        code, what = (_TERMINATED, "Terminated") if signal.SIGTERM in signals else (_INTERRUPTED, "Interrupted")
        sentence = f"{what}. What is done is kept; the same command goes on from there: {command}"
        console.print(sentence, soft_wrap=True)
    return code if isinstance(code, int) else 0


def _check_numbers(arguments: Sequence[str]) -> None:
    """Refuse numbers that libraries, which count in 64 bits, would fail on in their own words.

    Raises:
        UsageError: A flag that takes a whole number has one beyond any count; it is named.
    """
    for word, following in zip(arguments, (*arguments[1:], ""), strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else following
        if flag.startswith("--") and re.fullmatch(r"[+-]?\d{13,}", value) and flag in _whole_number_flags():
            raise UsageError(f"{flag} {escape.cut_text(value, 40)} is beyond any count; give a smaller number.")


@cache
def _whole_number_flags() -> frozenset[str]:
    commands = cast(TyperGroup, typer.main.get_command(app)).commands.values()
    every = (parameter for command in commands for parameter in command.params)
    return frozenset(flag for each in every if _kind(each) is int for flag in each.opts)


def _kind(parameter: object) -> object:
    """Return the type that a flag's words are turned into."""
    return getattr(getattr(parameter, "type_descriptor", None), "annotation", None)


@contextmanager
def _signals_as_interrupts() -> Iterator[list[int]]:
    """Let SIGTERM unwind as Ctrl-C does, so that weights are put back and temporary files go; yield those that came."""
    signals: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield signals
        return
    # A process whose parent ignores Ctrl-C goes on ignoring it.
    numbers = [signal.SIGTERM, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else [])]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(console: Console, sentence: str, code: int, *, debug: bool) -> int:
    """Print what went wrong, after its traceback with `debug`, and return the code.

    The sentence is text, whatever brackets it holds.
    """
    if debug:
        console.print_exception()
    shown = escape.cut_text(escape.terminal(sentence), _LONGEST_SENTENCE)
    console.print(Text.assemble(("error:", "red"), " ", shown), soft_wrap=True)
    return code
