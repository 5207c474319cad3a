"""Steps of one pass over the layers: the calls of a scorer as forward passes, their prefixes before them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qeval.backends.stream.layer_output import States
from qeval.backends.stream.layer_runner import padded
from qeval.backends.torch import one_sided
from qeval.types import Call, Request

Path = tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class Step:
    """A forward pass of [batch, tokens] `ids` after the prefix `path`. `keeps`: it computes a prefix itself.

    `places` say which requests of which call its rows answer; `states` is what the layers so far made of it.
    """

    path: Path
    sequences: Sequence[tuple[int, ...]]
    keeps: bool = False
    requests: Sequence[Request] = ()
    places: Sequence[tuple[int, int]] = ()
    states: States | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens that are run, padding included."""
        return len(self.sequences) * max(len(tokens) for tokens in self.sequences)

    @property
    def kept_path(self) -> Path:
        """The prefix that it computes."""
        return (*self.path, tuple(self.sequences[0]))

    def ids(self, device: torch.device) -> Tensor:
        """Return token ids [batch, tokens], filled up on the right."""
        return padded(self.sequences, device)


def plan_steps(calls: Sequence[Call], rope_limit: float, *, prefixes: bool = True) -> list[Step]:
    """Return the forward passes of some calls, in their order; a prefix that is open already is not run again.

    Without `prefixes` none is kept: every request is run whole.
    """
    steps: list[Step] = []
    open_path: Path = ()
    for number, call in enumerate(calls):
        for path, requests, rows in _parts(call, rope_limit, prefixes=prefixes):
            if path:
                steps += _prefixes(open_path, path)
                open_path = path
            places = [(number, row) for row in rows]
            steps.append(Step(path, [r.tokens for r in requests], requests=requests, places=places))
    return steps


def is_inside(path: Path, inner: Path) -> bool:
    """Return whether `inner` is `path` or continues it."""
    return inner[: len(path)] == path


def _prefixes(open_path: Path, path: Path) -> Iterator[Step]:
    shared = 0
    while shared < min(len(open_path), len(path)) and open_path[shared] == path[shared]:
        shared += 1
    for depth in range(shared, len(path)):
        yield Step(path[:depth], [path[depth]], keeps=True)


def _parts(call: Call, rope_limit: float, *, prefixes: bool) -> Iterator[tuple[Path, list[Request], list[int]]]:
    """Yield the requests of a call on either side of the rotary limit, and the prefix that they can continue."""
    length = sum(len(part) for part in call.path)
    for rows, fits in one_sided(call.requests, length, rope_limit):
        shares = fits and prefixes
        requests = [call.requests[row] for row in rows]
        if not shares:
            whole = tuple(token for part in call.path for token in part)
            requests = [r.after(whole) for r in requests]
        yield (call.path if shares else ()), requests, rows
