"""`qeval methods`, `qeval tasks`: what can be named, with one line each."""

from collections.abc import Iterable

from rich.table import Table

from qeval.cli.printing import stdout
from qeval.config import METHODS
from qeval.tasks.conventions import CONVENTIONS
from qeval.tasks.names import TASKS
from qeval.tasks.protocols import PROTOCOLS

_GRIDS = (
    ("rtn:int8-channel", "INT8, one scale a row"),
    ("rtn:int4-g32-asym", "INT4, blocks of 32, with zero points"),
    ("awq:noclip", "the scales alone, without the clip search"),
    ("gptq:noclip-noactorder", "as in the paper's first form: the full range, the columns as they stand"),
    ("gptq:int4-channel-damp0.05", "one scale a row, 5 % of the mean second moment added to every one (default 1 %)"),
    ("mixed-rtn:4.8bpw", "under a size budget in bits per weight"),
    ("hqq:int4-g64", "HQQ at 4 bits in blocks of 64"),
    ("torchao:int8wo", "torchao's INT8, one scale a row"),
    ("ort:k_quant-g128", "ONNX Runtime's k_quant in blocks of 128"),
    ("mixed:positional", "INT8 by position (first and last eighth, every third between), as other tools do"),
)


def methods() -> None:
    """The quantization methods, and how their names carry parameters."""
    show("method", METHODS.items())
    say("Plain names mean INT4, blocks of 128, symmetric; the head and the embedding stay in float.")
    show("for example", _GRIDS)
    say(
        "Parameters: int2..int8, gN | channel | tensor, sym | asym, clip | noclip, actorder | noactorder, dampN, Nbpw, "
        "measured | positional, head."
    )


def tasks() -> None:
    """The tasks, the named protocols and the conventions of perplexity."""
    show("task", TASKS.items())
    show("protocol", ((p.name, p.description) for p in PROTOCOLS.values()))
    show("convention", ((c.name, f"{c.description} ({c.source})") for c in CONVENTIONS.values()))


def show(kind: str, rows: Iterable[tuple[str, str]]) -> None:
    """A table of names and what they are."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(kind, no_wrap=True)
    table.add_column("what it is")
    for name, line in rows:
        table.add_row(name, line)
    stdout().print(table)


def say(line: str) -> None:
    """A line of its own."""
    stdout().print(f"\n{line}\n", highlight=False)
