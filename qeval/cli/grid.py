"""The methods of a sweep over bits, group sizes and budgets: the names that `compare` takes, written out."""

from collections.abc import Iterable, Sequence

from qeval.config import parse_budget, parse_method
from qeval.errors import UsageError
from qeval.quant.grid import MAX_BITS, MIN_BITS

_ALONE = {"rtn": "mixed-rtn", "awq": "mixed"}
"""The mixed method that a budget means for a method without one."""


def grid_methods(methods: str, bits: str | None, groups: str | None, budgets: str | None) -> list[str]:
    """Every method under every width and group size, and its mixed kin under every budget.

    Raises:
        UsageError: a width or a group size that no grid has, or budgets without a method that mixes.

    >>> grid_methods("rtn", "3,4", "32,channel", "4.8bpw")
    ['rtn:int3-g32', 'rtn:int3-channel', 'rtn:int4-g32', 'rtn:int4-channel', 'mixed-rtn:4.8bpw']
    """
    names = _listed(methods) or ["rtn", "awq"]
    plain = [name for name in names if not name.startswith("mixed")]
    if extra := [name for name in names if ":" in name]:
        raise UsageError(f"--methods {','.join(extra)}: with --bits or --groups, name methods without their grids.")
    widths = [_width(text) for text in _listed(bits)] or ["int4"]
    sizes = [_size(text) for text in _listed(groups)] or ["g128"]
    found = [f"{name}:{width}-{size}" for name in plain for width in widths for size in sizes]
    found += _mixed(names, _listed(budgets))
    for name in found:
        parse_method(name)
    return found


def without_methods(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Arguments without `--methods`, and what it said."""
    left, said, given = [], "", iter(arguments)
    for word in given:
        if word == "--methods":
            said = next(given, "")
        elif word.startswith("--methods="):
            said = word.partition("=")[2]
        else:
            left.append(word)
    return left, said


def _mixed(names: Sequence[str], budgets: Sequence[str]) -> list[str]:
    mixed = dict.fromkeys(name if name.startswith("mixed") else _ALONE.get(name, "") for name in names)
    kinds = [name for name in mixed if name]
    if budgets and not kinds:
        raise UsageError(f"--budgets is for rtn, awq and their mixed kin, not for {', '.join(names)}.")
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


def _listed(text: str | None) -> list[str]:
    return list(_stripped((text or "").split(",")))


def _stripped(parts: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(part.strip() for part in parts if part.strip())
