"""Find the prefixes of sequences that are worth running once. Pure: token ids in, a tree out.

Sorted, sequences with a common prefix lie side by side. A run of neighbours is run as it is, or shares its longest
common prefix, or is cut where neighbours have least in common; the parts are then decided anew, after that prefix or
without it, whichever runs fewer tokens. So a subject's examples are run once, and a passage that some of its questions
share once more inside. A prefix costs a few tokens itself, since it is a forward pass of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

_PREFIX_COST = 64
"""Tokens that a prefix pass is taken to cost beyond its own."""
_MOST_LEVELS = 4
_MOST_CUTS = 64
"""How often a run is cut into parts of parts, at most: what remains is run as it is."""


class PrefixNode(NamedTuple):
    """A prefix of `length` tokens (0: none): the sequences (by index) run right after it, and longer prefixes."""

    length: int
    members: tuple[int, ...]
    inner: tuple["PrefixNode", ...]

    @property
    def every(self) -> tuple[int, ...]:
        """All sequences that start with it."""
        return (*self.members, *(member for node in self.inner for member in node.every))


class _Choice(NamedTuple):
    cost: int
    members: tuple[int, ...]
    inner: tuple[PrefixNode, ...]


def prefix_tree(sequences: Sequence[Sequence[int]], limits: Sequence[int]) -> PrefixNode:
    """Return the prefixes to run. At most `limits[i]` tokens of sequence i may be in one."""
    order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
    if not order:
        return PrefixNode(0, (), ())
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    search = _Search(order, common, [len(sequences[i]) for i in order], [limits[i] for i in order])
    best = search.best(0, len(order), 0, 0, 0)
    return PrefixNode(0, best.members, best.inner)


def tokens_run(tree: PrefixNode, lengths: Sequence[int]) -> int:
    """Return the tokens run under a tree: every prefix once, of each sequence (of `lengths`) what follows its own."""
    own = sum(lengths[member] - tree.length for member in tree.members)
    return own + sum(node.length - tree.length + tokens_run(node, lengths) for node in tree.inner)


@dataclass(frozen=True, eq=False)
class _Search:
    """Sorted sequences: what neighbours have in common, their lengths, and how much may be in a prefix."""

    order: Sequence[int]
    common: Sequence[int]
    lengths: Sequence[int]
    limits: Sequence[int]
    known: dict[tuple[int, int, int, int], _Choice] = field(default_factory=dict)

    def best(self, start: int, stop: int, base: int, level: int, cuts: int) -> _Choice:
        """Return the cheapest way to run the sequences from `start` to `stop` after a prefix of `base` tokens."""
        key = (start, stop, base, level)
        if key not in self.known:
            self.known[key] = min(self._ways(start, stop, base, level, cuts), key=lambda way: way.cost)
        return self.known[key]

    def _ways(self, start: int, stop: int, base: int, level: int, cuts: int) -> list[_Choice]:
        plain = _Choice(sum(self.lengths[start:stop]) - base * (stop - start), tuple(self.order[start:stop]), ())
        if stop - start == 1 or cuts == _MOST_CUTS:
            return [plain]
        parts = self._parts(start, stop)
        ways = [plain, _joined([self.best(a, b, base, level, cuts + 1) for a, b in parts])]
        shared = min((*self.common[start : stop - 1], *self.limits[start:stop]))
        if shared > base and level < _MOST_LEVELS:
            inside = _joined([self.best(a, b, shared, level + 1, cuts + 1) for a, b in parts])
            cost = inside.cost + shared - base + _PREFIX_COST
            ways.append(_Choice(cost, (), (PrefixNode(shared, inside.members, inside.inner),)))
        return ways

    def _parts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the parts of a run between neighbours that have least in common."""
        least = min(self.common[start : stop - 1])
        ends = [i + 1 for i in range(start, stop - 1) if self.common[i] == least] + [stop]
        return list(zip([start, *ends[:-1]], ends, strict=True))


def _joined(choices: Sequence[_Choice]) -> _Choice:
    return _Choice(
        sum(choice.cost for choice in choices),
        tuple(member for choice in choices for member in choice.members),
        tuple(node for choice in choices for node in choice.inner),
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    low, high = 0, length
    while low < high:  # the longest equal start, by halving: slices compare fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
