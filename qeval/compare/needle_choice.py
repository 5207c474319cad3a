"""The haystacks of `--tasks needle`: their lengths, and the needles in them."""

from dataclasses import dataclass
from typing import Annotated

from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option
from qeval.errors import UsageError

_MOST_DEPTHS = 50


@dataclass(frozen=True)
class NeedleChoice(Checked):
    """The lengths of haystacks, how many there are of each, and the depths at which needles lie."""

    lengths: Annotated[
        tuple[int, ...],
        Option(
            "With needle: tokens of the haystacks, such as 1024,4096,16384.",
            keyword="needle_lengths",
            type=str,
            parse=read.lengths,
            least=1,
        ),
    ] = (1024, 4096)
    depths: Annotated[
        int, Option("With needle: depths, from the start to the end of a haystack.", keyword="needle_depths", least=1)
    ] = 5
    haystacks: Annotated[int, Option("With needle: haystacks of each length.", keyword="needle_haystacks", least=1)] = 8

    def __post_init__(self) -> None:
        """Refuse more needles than there are keys.

        Raises:
            UsageError: As `Checked`, and for more depths than a haystack has keys.
        """
        super().__post_init__()
        if self.depths > _MOST_DEPTHS:
            raise UsageError(f"--needle-depths {self.depths}: a haystack has {_MOST_DEPTHS} keys at most; give fewer.")
