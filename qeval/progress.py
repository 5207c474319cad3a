"""How long work tells where it is: phases with a number of units, told by whoever does the work."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of units just done."""


def in_parts(advance: Advance, units: int, parts: int) -> Callable[[], None]:
    """What is called once after each of `parts` equal parts of `units`: all of these have been told after the last.

    >>> told = []
    >>> done = in_parts(told.append, 10, 4)
    >>> for _ in range(4):
    ...     done()
    >>> told
    [2, 3, 2, 3]
    """
    places = itertools.count()

    def tell() -> None:
        place = next(places)
        advance(units * (place + 1) // parts - units * place // parts)

    return tell


class Progress(Protocol):
    """Shows phases and warnings to a person, or to nobody; `warnings` keeps the latter for the report."""

    warnings: list[str]

    def phase(self, label: str, units: int) -> AbstractContextManager[Advance]:
        """A phase of `units`; the block is given the function to call as they get done."""
        ...

    def warn(self, message: str) -> None:
        """Tell of something that was mended or that a reader must know."""
        ...

    def tell(self, message: str) -> None:
        """Say what is going on; nothing of it is kept."""
        ...


class Silent:
    """Shows nothing and remembers the warnings."""

    def __init__(self) -> None:
        """No warnings yet."""
        self.warnings: list[str] = []

    @contextmanager
    def phase(self, label: str, units: int) -> Iterator[Advance]:
        """Run the block."""
        del label, units
        yield lambda done: None

    def warn(self, message: str) -> None:
        """Remember the message."""
        self.warnings.append(message)

    def tell(self, message: str) -> None:
        """Say nothing."""
