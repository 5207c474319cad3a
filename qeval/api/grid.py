"""The methods of a sweep over bits, group sizes and budgets: the names that `compare` takes, written out."""

from collections.abc import Sequence

from qeval.compare.arguments import Names, names
from qeval.config import parse_budget, parse_method
from qeval.errors import UsageError
from qeval.methods import METHODS
from qeval.quant.grid import MAX_BITS, MIN_BITS


def grid_methods(methods: Names | None, bits: Names | None, groups: Names | None, budgets: Names | None) -> list[str]:
    """Return every method under every width and group size, and its mixed form under every budget.

    Args:
        methods: Methods without grids; default: rtn and awq.
        bits: Widths; default: 4.
        groups: Block sizes, "channel" or "tensor"; default: 128.
        budgets: Sizes in bits per weight.

    Raises:
        UsageError: A width or a group size that no grid has, or budgets without a method that mixes.

    >>> grid_methods("rtn", "3,4", "32,channel", "4.8bpw")
    ['rtn:int3-g32', 'rtn:int3-channel', 'rtn:int4-g32', 'rtn:int4-channel', 'mixed-rtn:4.8bpw']
    """
    bases = names(methods) or ("rtn", "awq")
    if extra := [name for name in bases if ":" in name]:
        raise UsageError(f"--methods {','.join(extra)}: with --bits or --groups, name methods without their grids.")
    plain = [name for name in bases if not (name in METHODS and METHODS[name].mixes)]
    widths = [_width(text) for text in names(bits)] or ["int4"]
    sizes = [_size(text) for text in names(groups)] or ["g128"]
    grid = [f"{name}:{width}-{size}" for name in plain for width in widths for size in sizes]
    grid += _mixed(bases, names(budgets))
    for name in grid:
        parse_method(name)
    return grid


def _mixed(bases: Sequence[str], budgets: Sequence[str]) -> list[str]:
    methods = [(name, METHODS[name]) for name in bases if name in METHODS]
    mixed = dict.fromkeys(name if method.mixes else method.mixed for name, method in methods)
    kinds = [name for name in mixed if name]
    if budgets and not kinds:
        raise UsageError(f"--budgets is for rtn, awq and their mixed kin, not for {', '.join(bases)}.")
    return [f"{name}:{parse_budget(text, '--budgets'):g}bpw" for name in kinds for text in budgets]


def _width(text: str) -> str:
    if not text.isdigit() or not MIN_BITS <= int(text) <= MAX_BITS:
        raise UsageError(f"--bits takes widths from {MIN_BITS} to {MAX_BITS} such as 2,3,4,8, not '{text}'.")
    return f"int{text}"


def _size(text: str) -> str:
    if text in ("channel", "tensor"):
        return text
    if not text.removeprefix("g").isdigit() or not int(text.removeprefix("g")):
        raise UsageError(f"--groups takes block sizes, channel and tensor, such as 32,128,channel, not '{text}'.")
    return f"g{text.removeprefix('g')}"
