"""The program `qeval`: arguments in, calls, exit codes out.

Exit codes: 0 done, 1 a gate failed, 2 wrong use, 3 a failure while running, 130 interrupted.
"""

import sys
from collections.abc import Sequence

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from qeval import __version__
from qeval.cli.compare import compare
from qeval.cli.listing import methods, models, tasks
from qeval.cli.quantize import quantize
from qeval.errors import QevalError

_INTERRUPTED = 130

app = typer.Typer(
    name="qeval",
    help="What a quantized language model lost against its FP16 original, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=TyperGroup,
)
app.command()(compare)
app.command()(quantize)
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
    try:
        code = app(args=list(arguments), standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        console.print("Interrupted. What is done is kept; the same command goes on from there.")
        return _INTERRUPTED
    except QevalError as error:
        if "--debug" in arguments:
            console.print_exception()
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return error.exit_code
    except Exception as error:
        if "--debug" in arguments:
            raise
        console.print(
            f"[red]error:[/red] {type(error).__name__}: {error} (--debug shows where)",
            highlight=False,
            soft_wrap=True,
        )
        return QevalError.exit_code
    return code if isinstance(code, int) else 0
