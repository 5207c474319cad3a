"""Which sequences share a prefix that is worth running once. Pure: token ids in, groups out.

Sorted, sequences with a common prefix lie side by side. A run of neighbours is either one group, sharing its longest
common prefix, or is cut where neighbours have least in common and each part decided anew, whichever runs fewer
tokens; a group costs a few tokens itself, since its prefix is a forward pass of its own.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

_GROUP_COST = 64
"""Tokens that a prefix pass is taken to cost beyond its own."""


class PrefixGroup(NamedTuple):
    """Sequences (by index) that share their first `length` tokens; 0: they are run whole."""

    length: int
    members: tuple[int, ...]


class _Choice(NamedTuple):
    cost: int
    groups: tuple[PrefixGroup, ...]


def group_by_prefix(sequences: Sequence[Sequence[int]], limits: Sequence[int]) -> list[PrefixGroup]:
    """Groups that cover every sequence once. At most `limits[i]` tokens of sequence i may be in a prefix."""
    order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    groups = _best(order, common, sequences, limits).groups if order else ()
    whole = tuple(member for group in groups if group.length == 0 for member in group.members)
    return [group for group in groups if group.length] + ([PrefixGroup(0, whole)] if whole else [])


def _best(
    order: Sequence[int], common: Sequence[int], sequences: Sequence[Sequence[int]], limits: Sequence[int]
) -> _Choice:
    lengths = sum(len(sequences[index]) for index in order)
    shared = min((*common, *(limits[index] for index in order))) if len(order) > 1 else 0
    saved = shared * (len(order) - 1) - _GROUP_COST
    together = _Choice(lengths - max(saved, 0), (PrefixGroup(shared if saved > 0 else 0, tuple(order)),))
    if len(order) == 1 or (min(common) == max(common) and shared == min(common)):
        return together
    parts = [_best(o, c, sequences, limits) for o, c in _cut(order, common)]
    apart = _Choice(sum(part.cost for part in parts), tuple(group for part in parts for group in part.groups))
    return apart if apart.cost < together.cost else together


def _cut(order: Sequence[int], common: Sequence[int]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The parts of a run between neighbours that have least in common."""
    least = min(common)
    ends = [i + 1 for i, value in enumerate(common) if value == least] + [len(order)]
    starts = [0, *ends[:-1]]
    return [(order[a:b], common[a : b - 1]) for a, b in zip(starts, ends, strict=True)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    low, high = 0, length
    while low < high:  # the longest equal start, by halving: slices compare fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
