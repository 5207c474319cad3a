"""The program `qeval`: arguments in, calls, exit codes out.

Exit codes: 0 done, 1 a gate failed, 2 wrong use, 3 a failure while running, 4 a gate could not
decide, 130 interrupted (Ctrl-C), 143 told to end (SIGTERM).
"""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from qeval import __version__
from qeval.cli.bench import bench
from qeval.cli.card import card
from qeval.cli.compare import compare
from qeval.cli.diff import diff
from qeval.cli.explain import explain
from qeval.cli.export import export
from qeval.cli.gate import gate
from qeval.cli.listing import methods, tasks
from qeval.cli.models import models
from qeval.cli.pipes import reader_may_leave
from qeval.cli.quantize import quantize
from qeval.cli.selfcheck import selfcheck
from qeval.cli.sensitivity import sensitivity
from qeval.cli.sweep import CONTEXT, INTERRUPTED, sweep
from qeval.cli.verify import verify
from qeval.errors import QevalError, UsageError

_TERMINATED = 143

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Threads that wait give way: spinning at barriers makes torch several times slower on a CPU that others use too."""

app = typer.Typer(
    name="qeval",
    help="What a quantized language model lost against its FP16 original, with error bars.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=TyperGroup,
)
app.command()(compare)
app.command(context_settings=CONTEXT)(sweep)
app.command()(bench)
app.command()(quantize)
app.command()(export)
app.command()(explain)
app.command()(gate)
app.command()(verify)
app.command()(selfcheck)
app.command()(sensitivity)
app.command()(card)
app.command()(diff)
app.command()(models)
app.command()(methods)
app.command()(tasks)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qeval {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with its code; errors are one sentence on stderr unless --debug is given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(given))


def run(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    console = Console(stderr=True)
    given = list(arguments) or ["--help"]
    command = shlex.join(["qeval", *given])
    try:
        with _sigterm_as_interrupt() as terminated, reader_may_leave():
            code = app(args=given, prog_name="qeval", standalone_mode=False, obj=command)
    except typer.TyperException as error:
        sentence = f"{error.format_message()} (--help lists what there is)"
        return _told(console, sentence, UsageError.exit_code, debug=False)
    except QevalError as error:
        return _told(console, str(error), error.exit_code, debug="--debug" in arguments)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, one line and an exit code
        debug = "--debug" in arguments
        where = "" if debug else " (--debug shows where)"
        return _told(console, f"{_in_a_line(error)}{where}", QevalError.exit_code, debug=debug)
    if code == INTERRUPTED:  # typer makes this of KeyboardInterrupt
        code, what = (_TERMINATED, "Terminated") if terminated else (INTERRUPTED, "Interrupted")
        sentence = f"{what}. What is done is kept; the same command goes on from there: {command}"
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)
    return code if isinstance(code, int) else 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """SIGTERM unwinds as Ctrl-C does, so that weights are put back and temporary files go; the list says if it came."""
    terminated: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_a_line(error: Exception) -> str:
    """What went wrong: with a file, which and what of it; else the error's name and its words, whatever their lines."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"Cannot use {error.filename}: {error.strerror}."
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _told(console: Console, sentence: str, code: int, *, debug: bool) -> int:
    """Say what went wrong, after its traceback if asked for; the sentence is text, whatever brackets it holds."""
    if debug:
        console.print_exception()
    console.print(Text.assemble(("error:", "red"), " ", sentence), soft_wrap=True)
    return code
