"""Progress of work: phases with a number of units, reported by whoever does the work."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from qeval.escape import terminal

Advance = Callable[[int], None]
"""Called with the number of units just done."""
Notify = Callable[[str], None]
"""Called with a sentence for the user, such as a warning."""


def in_parts(advance: Advance, units: int, parts: int) -> Callable[[], None]:
    """Return what to call after each of `parts` equal parts of `units`, so that in the end all were counted.

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
    """A display of phases and warnings, for a person or for nobody; `warnings` keeps the latter for the report."""

    warnings: list[str]

    def phase(self, label: str, units: int) -> AbstractContextManager[Advance]:
        """Open a phase of `units`; the block gets the function to call as they get done."""
        ...

    def warn(self, message: str) -> None:
        """Tell of something that was mended or that a reader must know."""
        ...

    def tell(self, message: str) -> None:
        """Say what is going on; nothing of it is kept."""
        ...


class Silent:
    """Progress that shows nothing and remembers the warnings."""

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


class Logged(Silent):
    """Progress that remembers warnings and logs them to `qeval`, which Python by default writes to stderr."""

    _logger = logging.getLogger("qeval")

    def warn(self, message: str) -> None:
        """Remember the message and log it as a warning."""
        super().warn(message)
        self._logger.warning("%s", terminal(message))

    def tell(self, message: str) -> None:
        """Log the message as information."""
        self._logger.info("%s", terminal(message))
