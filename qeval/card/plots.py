"""A card's plots: quality against size and the distribution of KL, at card width, for a light and a dark page."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from qeval.report import Report, style
from qeval.report.page import Plot
from qeval.report.plots import kl_distribution, quality_against_size

FOLDER = "qeval-card"
"""Where the plots lie, beside the card."""

_PIXELS_PER_INCH = 96
_WIDTH = 7.2
LIGHT = replace(style.LIGHT, width=_WIDTH)
DARK = style.Dress(
    ink="#e6e9ed", muted="#a2abb6", grid="#343b45", paper="#0b0f19", palette=style.DARK_PALETTE, width=_WIDTH
)
"""The paper is that of the hub's dark pages."""

_DRAWN: tuple[Callable[[Report], Plot | None], ...] = (quality_against_size, kl_distribution)


class Pair(NamedTuple):
    """One plot in both dresses; `width` in pixels."""

    name: str
    alt: str
    width: int
    light: Plot
    dark: Plot

    def files(self) -> dict[str, bytes]:
        """The files of both dresses by name."""
        return {
            f"{self.name}-{dress}{suffix}": data
            for dress, plot in (("light", self.light), ("dark", self.dark))
            for suffix, data in ((".png", plot.png), (".svg", plot.svg.encode()))
        }


def card_plots(report: Report) -> list[Pair]:
    """The plots that the report's content allows."""
    found = []
    for draw in _DRAWN:
        light, dark = (_drawn(draw, report, dress) for dress in (LIGHT, DARK))
        if light and dark:
            found.append(Pair(light.name, light.alt, round(_WIDTH * _PIXELS_PER_INCH), light, dark))
    return found


def _drawn(draw: Callable[[Report], Plot | None], report: Report, dress: style.Dress) -> Plot | None:
    with style.styled(dress):
        return draw(report)
