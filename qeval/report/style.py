"""How the plots look: a palette that colour-blind readers tell apart, the same bytes each time.

The colours of ink, grid and paper become the page's variables when a plot stands in the page, so that it
follows its light and dark dress; as files they stand on white paper.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1f2329"
MUTED = "#5c6570"
GRID = "#dfe3e8"
PAPER = "#fefefe"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}

# Okabe and Ito, "Color Universal Design" (2008), without black and yellow, some darkened.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5559c", "#c98500", "#3b9bdc", "#8a6d3b", "#7b68c8")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES = ("-", "--", "-.", ":")

WIDTH = 4.9
"""Inches: narrow enough that the letters stay legible when the page is 390 px wide."""

_RC = {
    "svg.hashsalt": "qeval",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "mathtext.default": "regular",
}
_PNG_DPI = 200


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside this block."""
    with mpl.rc_context(_RC):
        yield


def figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one axes, apart from pyplot's global state."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.add_subplot()


def colour(index: int) -> str:
    """The colour of the variant at this place; it comes round again after the last."""
    return PALETTE[index % len(PALETTE)]


def marker(index: int) -> str:
    """The marker of the variant at this place."""
    return MARKERS[index % len(MARKERS)]


def dash(index: int) -> str:
    """The line style of the variant at this place: it comes round after four."""
    return DASHES[index % len(DASHES)]


def save(made: Figure) -> tuple[str, bytes]:
    """The figure as SVG text and as PNG bytes, without dates or versions in them."""
    svg, png = BytesIO(), BytesIO()
    made.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    made.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
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
