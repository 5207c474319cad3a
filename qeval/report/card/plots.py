"""A card's plots: quality against size and the distribution of KL, at card width, for a light and a dark page."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from qeval.report import Report, style
from qeval.report.document import Plot
from qeval.report.plots import kl_distribution, quality_against_size

FOLDER = "qeval-card"
"""The folder of the plots, next to the card."""

_PIXELS_PER_INCH = 96
_WIDTH = 7.2
CARD_LIGHT = replace(style.LIGHT, width=_WIDTH)
CARD_DARK = style.Theme(
    ink="#e6e9ed", muted="#a2abb6", grid="#343b45", paper="#0b0f19", palette=style.DARK_PALETTE, width=_WIDTH
)
"""The paper is that of the hub's dark pages."""

_DRAWN: tuple[Callable[[Report], style.Drawing | None], ...] = (quality_against_size, kl_distribution)


class Pair(NamedTuple):
    """One plot in both themes; `width` in pixels."""

    name: str
    alt: str
    width: int
    light: Plot
    dark: Plot

    def files(self) -> dict[str, bytes]:
        """Return the files of both themes by name."""
        return {
            f"{self.name}-{theme}{suffix}": data
            for theme, plot in (("light", self.light), ("dark", self.dark))
            for suffix, data in ((".png", plot.png), (".svg", plot.svg.encode()))
        }


def card_plots(report: Report) -> list[Pair]:
    """Draw the plots that the report's content allows."""
    pairs = []
    for draw in _DRAWN:
        light, dark = (_drawn(draw, report, theme) for theme in (CARD_LIGHT, CARD_DARK))
        if light and dark:
            pairs.append(Pair(light.name, light.alt, round(_WIDTH * _PIXELS_PER_INCH), light, dark))
    return pairs


def _drawn(draw: Callable[[Report], style.Drawing | None], report: Report, theme: style.Theme) -> Plot | None:
    with style.styled(theme):
        drawing = draw(report)
        return drawing.plot() if drawing else None
