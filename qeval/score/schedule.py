"""The order in which sequences are run: prefixes first, then what continues them, in batches of a token budget.

What a batch holds follows from the sequences, the budget, and whether the session packs them. Where it doesn't, 5 % of
a batch's tokens may be padding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from qeval.backends.base import Prefix, Session
from qeval.score.prefix import PrefixNode, prefix_tree
from qeval.types import Call, Request, TokenIds

WASTE = 0.05
"""The share of a batch's tokens that may be padding."""

_Fits = Callable[[Sequence[int]], bool]
"""Whether sequences of these lengths may be one batch."""


class Batch(NamedTuple):
    """The requests of one call of a session, and the sequences (by index) that they are, in order."""

    call: Call
    members: tuple[int, ...]


_PACKED_SPREAD = 2
"""Attention sees packed sequences side by side, filled up: that may take so many times the budget."""


def schedule(requests: Sequence[Request], batch_tokens: int, *, packs: bool = False) -> list[Batch]:
    """Return every request once; no position that is read lies inside a prefix. `packs`: the session's."""
    tree = prefix_tree([r.tokens for r in requests], [r.positions[0] for r in requests])
    fits = partial(_fits_packed if packs else _fits, batch_tokens=batch_tokens)
    return list(_scheduled(requests, tree, (), fits))


def windows_schedule(requests: Sequence[Request], batch_tokens: int) -> list[Call]:
    """Requests in their order, without prefixes: as many a batch as the budget holds and padding allows."""
    calls: list[Call] = []
    batch: list[Request] = []
    for request in requests:
        if batch and not _fits([len(r.tokens) for r in [*batch, request]], batch_tokens):
            calls.append(Call((), tuple(batch)))
            batch = []
        batch.append(request)
    return [*calls, Call((), tuple(batch))] if batch else calls


def padding_waste(calls: Sequence[Call]) -> float:
    """Return the share of the tokens run that is padding, prefixes not counted."""
    lengths = [[len(request.tokens) for request in call.requests] for call in calls]
    run = sum(max(own) * len(own) for own in lengths)
    return 1 - sum(map(sum, lengths)) / run if run else 0.0


class Prefixes:
    """The prefixes of a session that are open: what the next call shares with the last is not run again."""

    def __init__(self, session: Session) -> None:
        """Nothing is open yet."""
        self._session = session
        self._open: list[tuple[TokenIds, Prefix]] = []

    def at(self, path: Sequence[TokenIds]) -> Prefix | None:
        """Return the prefix of a call's path, run as far as it isn't yet; None for an empty path."""
        shared = 0
        while shared < min(len(self._open), len(path)) and self._open[shared][0] == path[shared]:
            shared += 1
        del self._open[shared:]
        for part in path[shared:]:
            self._open.append((part, self._session.prefill(part, self._open[-1][1] if self._open else None)))
        return self._open[-1][1] if self._open else None


def _scheduled(
    requests: Sequence[Request], node: PrefixNode, path: tuple[TokenIds, ...], fits: _Fits
) -> Iterator[Batch]:
    for members in _batches([len(r.tokens) - node.length for r in requests], requests, node.members, fits):
        yield Batch(Call(path, tuple(_rest(requests[index], node.length) for index in members)), members)
    for inner in node.inner:
        part = requests[inner.every[0]].tokens[node.length : inner.length]
        yield from _scheduled(requests, inner, (*path, part), fits)


def _batches(
    lengths: Sequence[int], requests: Sequence[Request], members: Sequence[int], fits: _Fits
) -> Iterator[tuple[int, ...]]:
    """Sequences of like length together, the longest first."""
    ordered = sorted(members, key=lambda index: (-lengths[index], requests[index].tokens))
    while ordered:
        count = 1
        while count < len(ordered) and fits([lengths[i] for i in ordered[: count + 1]]):
            count += 1
        yield tuple(ordered[:count])
        ordered = ordered[count:]


def _fits(lengths: Sequence[int], batch_tokens: int) -> bool:
    run = max(lengths) * len(lengths)
    return run <= batch_tokens and sum(lengths) >= (1 - WASTE) * run


def _fits_packed(lengths: Sequence[int], batch_tokens: int) -> bool:
    return sum(lengths) <= batch_tokens and max(lengths) * len(lengths) <= _PACKED_SPREAD * batch_tokens


def _rest(request: Request, skip: int) -> Request:
    return Request(request.tokens[skip:], tuple(position - skip for position in request.positions))
