"""Flags, made of the options of the settings: those of a whole function (`with_flags_of`), and one alone (`flag`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from qeval.compare.defaults import HubChoice
from qeval.compare.options import Option, options_by_keyword
from qeval.compare.settings import Settings

R = TypeVar("R")


def flag(option: Option, *default: Any) -> Any:
    """Return an option as typer takes it, an argument where its spelling is no flag.

    Args:
        option: The option of a setting.
        *default: Its default, or `...` where there is none, if it stands in a default's place; else in an annotation.
    """
    if not option.flags[0].startswith("-"):
        return typer.Argument(*default, help=option.help)
    return typer.Option(*default, *option.flags, help=option.help, min=option.least if option.range_shown else None)


_SHARED = options_by_keyword(Settings, HubChoice)
Revision = Annotated[str | None, flag(_SHARED["revision"])]
Device = Annotated[str, flag(_SHARED["device"])]
Offline = Annotated[bool, flag(_SHARED["offline"])]
Threads = Annotated[int | None, flag(_SHARED["threads"])]

_JSON = Option("Print the result as JSON on stdout.", flags=("--json",))
_QUIET = Option("No plan, no progress; warnings and the result only.", flags=("--quiet",))
_DEBUG = Option("Show a traceback when something fails.", flags=("--debug",))
Json = Annotated[bool, flag(_JSON)]
Quiet = Annotated[bool, flag(_QUIET)]
Debug = Annotated[bool, flag(_DEBUG)]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a finished run.", show_default=False)]


@dataclass(frozen=True)
class CommandCall:
    """A command as it was called: the keywords of its function, how the result is printed, and the whole line."""

    values: dict[str, Any]
    as_json: bool
    quiet: bool
    line: str


def with_flags_of(
    *functions: Callable[..., Any], trees: Sequence[type], **changes: str | Option
) -> Callable[[Callable[[CommandCall], R]], Callable[..., R]]:
    """Make a command of what a call of it does: its flags are the keywords of functions, and --json, --quiet, --debug.

    Names, order and defaults are the functions'; help, type and range are those of the options with these keywords.
    Keywords that have no option are no flags. What may be None and has no default needs no flag.

    Args:
        functions: Functions of `qeval.api`.
        trees: Dataclasses with options: those of the settings.
        **changes: By keyword, another help text, or an option that no tree has.
    """
    options = options_by_keyword(*trees)
    for keyword, change in changes.items():
        known = options.get(keyword, Option("", type=str).of_field(keyword, str))
        options[keyword] = replace(known, help=change) if isinstance(change, str) else change.of_field(keyword, str)
    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += _parameters(functions, options)
    for keyword, option in (("as_json", _JSON), ("quiet", _QUIET), ("debug", _DEBUG)):
        parameters.append(Parameter(keyword, Parameter.KEYWORD_ONLY, default=flag(option, False), annotation=bool))

    def decorate(do: Callable[[CommandCall], R]) -> Callable[..., R]:
        def command(*, context: typer.Context, as_json: bool, quiet: bool, debug: bool, **values: Any) -> R:
            del debug  # read by the program's own error handler
            return do(CommandCall(values, as_json, quiet, str(context.obj)))

        command.__name__, command.__doc__, command.__module__ = do.__name__, do.__doc__, do.__module__
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(functions: Sequence[Callable[..., Any]], options: Mapping[str, Option]) -> Iterator[Parameter]:
    """Yield the functions' keywords that have an option, each once, with a flag in the place of their default."""
    every: dict[str, Parameter] = {}
    for function in functions:
        for name, parameter in signature(function).parameters.items():
            every.setdefault(name, parameter)
    for name, parameter in every.items():
        if option := options.get(name):
            default = parameter.default
            if default is Parameter.empty:
                default = None if type(None) in get_args(option.type) else ...
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=flag(option, default), annotation=option.type)
