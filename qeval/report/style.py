"""How the plots look: palettes that colour-blind readers tell apart, the same bytes each time.

A dress (colours and width) is put on by `styled`; inside its block the functions below give the dress's colours.

The colours of ink, grid and paper become the page's variables when a plot stands in the page, so that it
follows its light and dark dress; as files they stand on white paper.
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

WIDTH = 4.9
"""Inches: narrow enough that the letters stay legible when the page is 390 px wide."""


@dataclass(frozen=True)
class Dress:
    """The colours of a plot and its width in inches."""

    ink: str = INK
    muted: str = MUTED
    grid: str = GRID
    paper: str = PAPER
    palette: tuple[str, ...] = PALETTE
    width: float = WIDTH


LIGHT = Dress()

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
def styled(dress: Dress = LIGHT) -> Iterator[None]:
    """Draw and save inside this block."""
    colours = {
        dress.ink: ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
        dress.muted: ("axes.edgecolor", "xtick.color", "ytick.color"),
        dress.grid: ("grid.color",),
        dress.paper: ("axes.facecolor", "figure.facecolor", "savefig.facecolor"),
    }
    own: dict[str, Any] = {key: colour for colour, keys in colours.items() for key in keys}
    own |= {"axes.prop_cycle": cycler(color=dress.palette), "figure.figsize": (dress.width, dress.width)}
    with mpl.rc_context(_RC | own):
        yield


def figure(height: float) -> tuple[Figure, Axes]:
    """A figure with one axes, as wide as the dress and `height` inches high, apart from pyplot's global state."""
    made = Figure(figsize=(mpl.rcParams["figure.figsize"][0], height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.add_subplot()


def ink() -> str:
    """The colour of letters."""
    return str(mpl.rcParams["text.color"])


def muted() -> str:
    """The colour of what stands back: axes, the baseline, lines between points."""
    return str(mpl.rcParams["axes.edgecolor"])


def grid() -> str:
    """The colour of grid lines."""
    return str(mpl.rcParams["grid.color"])


def paper() -> str:
    """The colour that plots stand on."""
    return str(mpl.rcParams["axes.facecolor"])


def colour(index: int) -> str:
    """The colour of the variant at this place; it comes round again after the last."""
    palette: list[str] = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return palette[index % len(palette)]


def marker(index: int) -> str:
    """The marker of the variant at this place."""
    return MARKERS[index % len(MARKERS)]


def dash(index: int) -> str:
    """The line style of the variant at this place: it comes round after three."""
    return DASHES[index % len(DASHES)]


def save(made: Figure) -> tuple[str, bytes]:
    """The figure as SVG text and as PNG bytes, without dates or versions in them."""
    if engine := made.get_layout_engine():
        engine.execute(made)
        made.set_layout_engine(
            "none"
        )  # laid out once; `savefig` would do it, and draw the figure twice, for each format
    svg, png = BytesIO(), BytesIO()
    FigureCanvasSVG(made).print_svg(svg, metadata={"Date": None, "Creator": None})
    made.set_dpi(_PNG_DPI)
    FigureCanvasAgg(made).print_png(png, metadata={"Software": None})
    return svg.getvalue().decode(), png.getvalue()


def inline(svg: str, prefix: str) -> str:
    """An SVG to stand inside a page: no XML prologue, the page's colours, ids that no other figure has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    for literal, variable in _VARIABLES.items():
        body = body.replace(literal, variable)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
