"""A figure that a rule limits, with its bounds where it rests on rows."""

from dataclasses import dataclass

from qeval.stats.bootstrap import Floats
from qeval.stats.bounds import Bounded
from qeval.stats.flips import mcnemar


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure that a rule limits: a value in the metric's unit, and its bounds where it rests on rows.

    `rows` and `clusters` say what of ("questions" in "subjects"); `detail` is a remark on the figure; `at_chance` is
    the sentence about a baseline that is no better than guessing; `unchanged` is the value of the baseline itself.
    """

    value: float
    bounded: Bounded | None = None
    rows: str = ""
    clusters: str = ""
    detail: str | None = None
    at_chance: str | None = None
    unchanged: float = 0.0

    @property
    def effect(self) -> float:
        """The distance of the value from that of no change at all."""
        return abs(self.value - self.unchanged)


def both_ways(before: Floats, now: Floats) -> str:
    """Return flips of accuracy both ways, and whether more went one way."""
    lost, won = int((before > now).sum()), int((before < now).sum())
    return f"{lost} lost and {won} won (McNemar's exact test: p = {mcnemar(lost, won):.2g})"
