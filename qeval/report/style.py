"""The style of the plots: palettes that colour-blind readers tell apart, the same bytes each time.

A theme (colours and width) is set by `styled`; inside its block the functions below give the theme's colours.

The colours of ink, grid and paper become the page's variables when a plot stands in the page, so that it
follows its light and dark colours; as files they stand on white paper.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qeval.report.document import Plot

INK = "#1f2329"
MUTED = "#5c6570"
GRID = "#dfe3e8"
PAPER = "#fefefe"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}

# Okabe and Ito, "Color Universal Design" (2008), without black and yellow, some darkened.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5559c", "#c98500", "#3b9bdc", "#8a6d3b", "#7b68c8")
DARK_PALETTE = ("#58a9e0", "#ff8f57", "#35c79c", "#de8fcb", "#e9b44c", "#9ad0f5", "#c9a86f", "#ab9df2")

# As many markers and line styles as have no divisor in common with the colours, so that few pairs come round again.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")

PLOT_WIDTH = 4.9
"""Inches: narrow enough that the letters stay legible when the page is 390 px wide."""


@dataclass(frozen=True)
class Theme:
    """The colours of a plot and its width in inches."""

    ink: str = INK
    muted: str = MUTED
    grid: str = GRID
    paper: str = PAPER
    palette: tuple[str, ...] = PALETTE
    width: float = PLOT_WIDTH


LIGHT = Theme()


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure before it is saved: `name` is its files' stem, `alt` says in words what it shows."""

    figure: Figure
    name: str
    title: str
    alt: str

    def plot(self) -> Plot:
        """Return the figure as files; inside the block of `styled` that it was drawn in."""
        svg, png = save(self.figure)
        return Plot(self.name, self.title, self.alt, svg, png)


_RC = {
    "svg.hashsalt": "qeval",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "mathtext.default": "regular",
}
_PNG_DPI = 200


@contextmanager
def styled(theme: Theme = LIGHT) -> Iterator[None]:
    """Draw and save inside this block."""
    colours = {
        theme.ink: ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
        theme.muted: ("axes.edgecolor", "xtick.color", "ytick.color"),
        theme.grid: ("grid.color",),
        theme.paper: ("axes.facecolor", "figure.facecolor", "savefig.facecolor"),
    }
    settings: dict[str, Any] = {key: colour for colour, keys in colours.items() for key in keys}
    settings |= {"axes.prop_cycle": cycler(color=theme.palette), "figure.figsize": (theme.width, theme.width)}
    with mpl.rc_context(_RC | settings):
        yield


def figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure with one axes, as wide as the theme and `height` inches high, apart from pyplot's state."""
    new = Figure(figsize=(mpl.rcParams["figure.figsize"][0], height), layout="constrained")
    FigureCanvasAgg(new)
    return new, new.add_subplot()


def ink() -> str:
    """Return the colour of letters."""
    return str(mpl.rcParams["text.color"])


def muted() -> str:
    """Return the colour of what stands back: axes, the baseline, lines between points."""
    return str(mpl.rcParams["axes.edgecolor"])


def grid() -> str:
    """Return the colour of grid lines."""
    return str(mpl.rcParams["grid.color"])


def paper() -> str:
    """Return the colour that plots stand on."""
    return str(mpl.rcParams["axes.facecolor"])


def colour(index: int) -> str:
    """Return the colour of the variant at this place; it comes round again after the last."""
    palette: list[str] = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return palette[index % len(palette)]


def marker(index: int) -> str:
    """Return the marker of the variant at this place."""
    return MARKERS[index % len(MARKERS)]


def dash(index: int) -> str:
    """Return the line style of the variant at this place: it comes round after three."""
    return DASHES[index % len(DASHES)]


def save(figure: Figure) -> tuple[str, bytes]:
    """Return the figure as SVG text and as PNG bytes, without dates or versions in them."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(
            "none"
        )  # laid out once; `savefig` would do it, and draw the figure twice, for each format
    svg, png = BytesIO(), BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_dpi(_PNG_DPI)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return svg.getvalue().decode(), png.getvalue()


def inline(svg: str, prefix: str) -> str:
    """Return an SVG to stand inside a page: no XML prologue, the page's colours, ids that no other figure has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    for literal, variable in _VARIABLES.items():
        body = body.replace(literal, variable)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
