"""The map of a mix of formats: layers down, kinds of linears across, the format of each group as colour and mark."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qeval.quant.grid import FLOAT
from qeval.report import style
from qeval.store.run import GroupRecord

_MARK: dict[str, Any] = {
    "markerfacecolor": "#ffffff",
    "markeredgecolor": "#000000",
    "markeredgewidth": 0.7,
    "linestyle": "none",
}


def draw_formats(groups: Sequence[GroupRecord], formats: Sequence[str]) -> Figure:
    """Draw a cell for each group in the colour of its format, with that format's mark; what stays in float is grey.

    Args:
        groups: The groups of a mix of formats.
        formats: The formats that they got, in the order of the legend.
    """
    kinds = list(dict.fromkeys(group.kind for group in groups))
    layers = sorted({group.layer for group in groups})
    cells = np.full((len(layers), len(kinds)), np.nan)
    for group in groups:
        if group.format is not None:
            cells[layers.index(group.layer), kinds.index(group.kind)] = formats.index(group.format)

    colours = [style.grid() if name == FLOAT else style.colour(place) for place, name in enumerate(formats)]
    figure, axes = style.figure(min(1.9 + 0.155 * len(layers), 9.5))
    axes.pcolormesh(
        np.arange(len(kinds) + 1) - 0.5,
        np.arange(len(layers) + 1) - 0.5,
        np.ma.masked_invalid(cells),
        cmap=ListedColormap(colours),
        norm=BoundaryNorm(np.arange(len(formats) + 1) - 0.5, len(formats)),
        edgecolors=style.paper(),
        linewidth=0.6,
    )

    # marks tell formats apart where colours don't, or have come round again
    handles: list[Any] = []
    for place, colour in enumerate(colours):
        down, across = np.nonzero(cells == place)
        axes.plot(across, down, marker=style.marker(place), markersize=3.5, **_MARK)
        mark = Line2D([], [], marker=style.marker(place), markersize=5, **_MARK)
        handles.append((Patch(facecolor=colour), mark))
    figure.legend(handles, formats, loc="outside lower center", ncols=min(len(formats), 3))
    name_cells(axes, kinds, layers)
    return figure


def name_cells(axes: Axes, kinds: Sequence[str], layers: Sequence[int]) -> None:
    """Name the columns and the rows of a map, the first layer at the top."""
    axes.set_xticks(range(len(kinds)), kinds)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: str(layers[int(at)]) if 0 <= at < len(layers) else ""))
    axes.set_ylabel("Layer")
    axes.invert_yaxis()
