"""The commands by name. A command's module is imported when the command runs or is asked for help, and not before."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup


class Command(NamedTuple):
    """A command: the line that `qeval --help` shows, which is the first of its own help, and where it is defined."""

    summary: str
    module: str | None = None
    """A module of this package; None: the one of the command's name."""
    function: str | None = None
    """Its function there; None: the one of the command's name."""
    takes_all_flags: bool = False
    """Whether flags that the command does not know reach it as words."""


COMMANDS: Mapping[str, Command] = MappingProxyType({
    "compare": Command("Quantize a model each way, score every variant against the baseline, and write a report."),
    "sweep": Command(
        "Compare several models each with its variants (all other flags are those of `qeval compare`), on one page.",
        takes_all_flags=True,
    ),
    "bench": Command("Time each variant in each engine by batch size and prompt length, and measure its memory."),
    "quantize": Command(
        "Quantize a model one way and write the variant: packed integers, scales, zero points, manifest."
    ),
    "export": Command(
        "Quantize a model one way and write it as an ONNX folder, a checkpoint for vLLM or a GGUF file."
    ),
    "explain": Command("Show which rows make a variant's loss, from a finished run's folder alone."),
    "advise": Command(
        "Find what a variant loses by, propose at most three treatments, and measure each on held-out windows."
    ),
    "import": Command(
        "Make a run of rows that other programs measured, which gate, diff and card read as any other.",
        "import_rows",
        "import_rows",
    ),
    "board": Command(
        "Show runs of one token hash over time: figures with intervals, trends, and the points where they change."
    ),
    "gate": Command("Judge a run by a policy."),
    "verify": Command("Check every checksum of a run, and compute a random sample of its rows again from the model."),
    "selfcheck": Command(
        "Reproduce published figures: what this machine can reach, each with its deviation, and what it can't, and why."
    ),
    "sensitivity": Command(
        "Measure each group of linears alone quantized and left in float, map them, and list what a mix would pick."
    ),
    "doctor": Command(
        "Look at Python, torch, GPUs, ONNX Runtime, extras, the hub and the caches, and say what mends what is wrong."
    ),
    "card": Command(
        "Write a model card's section, with metadata, tables and plots, from a finished run's folder alone."
    ),
    "diff": Command("Compare two runs of one model row by row: versions of a tool, backends, recipes."),
    "models": Command(
        "The model aliases, and what else --model takes; with --check, what works for which model family."
    ),
    "methods": Command("The quantization methods, and how their names carry parameters.", "listing"),
    "tasks": Command("The tasks, the named protocols and the conventions of perplexity.", "listing"),
})  # fmt: skip


class CommandGroup(TyperGroup):
    """The program's commands, each imported when it is first looked up."""

    def __init__(self, **settings: Any) -> None:
        """Take the commands of the table in the place of registered ones."""
        super().__init__(**settings | {"commands": None})
        self.commands = cast(MutableMapping[str, Any], _Commands())

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands from the table alone."""
        summaries = [TyperCommand(name, help=entry.summary) for name, entry in COMMANDS.items()]
        TyperGroup(commands=summaries).format_commands(ctx, formatter)


class _Commands(Mapping[str, TyperCommand]):
    """The parser of each command by name."""

    def __getitem__(self, name: str) -> TyperCommand:
        if name not in COMMANDS:
            raise KeyError(name)
        return _load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@cache
def _load(name: str) -> TyperCommand:
    entry = COMMANDS[name]
    context = {"allow_extra_args": True, "ignore_unknown_options": True} if entry.takes_all_flags else None
    return parser_of(getattr(import_module(f"qeval.cli.{entry.module or name}"), entry.function or name), name, context)


def parser_of(function: Callable[..., Any], name: str, context: dict[str, Any] | None = None) -> TyperCommand:
    """Return the parser of a command that is a function, as typer makes it.

    Args:
        function: The command; its parameters are flags.
        name: What the command is called.
        context: Settings of the parser.
    """
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name=name, context_settings=context)(function)
    return cast(TyperCommand, typer.main.get_command(alone))
