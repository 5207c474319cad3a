"""Ticks as plain numbers, and names written at their points, where a legend would make the eye travel."""

from collections.abc import Sequence
from itertools import product
from math import ceil, floor, log10
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from qeval.report import style
from qeval.stats.bootstrap import Floats

_FEWEST_TICKS = 3
_MOST_TICKS = 7
_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
_SMALLEST_PLAIN = 1e-4
"""An axis that begins below is labelled in powers of ten."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_GAPS = (6.0, 12.0)
"""Points between a marker's middle and its name, the nearer first."""
_MARKER = 4.5
"""Points from a marker's middle to its edge."""
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_ACROSS: dict[int, Literal["left", "center", "right"]] = {-1: "right", 0: "center", 1: "left"}
_UP: dict[int, Literal["top", "center", "bottom"]] = {-1: "top", 0: "center", 1: "bottom"}


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis, whose limits are set, at a few round values, as plain numbers such as 0.2 and 0.5.

    Minor ticks, which take half the time of a plot, are left out. A linear axis stays as it is.
    """
    if axis.get_scale() != "log":
        return
    low, high = sorted(axis.get_view_interval())
    ticks = _round_values(low, high)
    powers = low < _SMALLEST_PLAIN and all(log10(tick) == round(log10(tick)) for tick in ticks)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value) if powers else f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """Return a power of ten as a tick says it.

    >>> power_of_ten(0.001), power_of_ten(10.0)
    ('10⁻³', '10¹')
    """
    return "10" + str(round(log10(value))).translate(_SUPERSCRIPTS)


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]], lines: Sequence[Path]) -> bool:
    """Write each name beside its point, where all have room, and return whether they have; where not, write none.

    Args:
        figure: The figure, complete but for its names; it is laid out here.
        axes: Its axes, with the final limits.
        points: Each point's place in data coordinates, and its name.
        lines: What names should not cross, in data coordinates. Where they must, the line is hidden behind the name.
    """
    figure.draw_without_rendering()
    middles = axes.transData.transform([(x, y) for x, y, _ in points])
    size = _MARKER * figure.dpi / 72
    markers = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in middles]
    room = _Room(axes.get_window_extent(), middles, [axes.transData.transform_path(line) for line in lines], markers)

    written: list[Annotation] = []
    for place, (x, y, name) in enumerate(points):
        text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=8, color=style.ink())
        text.set_path_effects([withStroke(linewidth=2.5, foreground=style.paper())])
        text.set_in_layout(False)
        written.append(text)
        for gap, crosses, side in product(_GAPS, (False, True), _SIDES):
            _move(text, gap, side)
            if room.is_free(text.get_window_extent(), place, crosses):
                room.taken.append(text.get_window_extent())
                break
        else:
            for each in written:
                each.remove()
            return False
    return True


class _Room(NamedTuple):
    """The room for names, in pixels: the axes, the points' middles [points, 2], lines, and what is taken already."""

    inside: Bbox
    middles: Floats
    lines: list[Path]
    taken: list[Bbox]

    def is_free(self, box: Bbox, place: int, crosses: bool) -> bool:
        """Return whether a name may stand in a box: free, in the axes, and nearer to its own point than to another.

        Args:
            box: Where the name would stand.
            place: Its point, as an index of `middles`.
            crosses: Whether it may cross lines.
        """
        if not (self.inside.x0 <= box.x0 and box.x1 <= self.inside.x1):
            return False
        if not (self.inside.y0 <= box.y0 and box.y1 <= self.inside.y1) or box.count_overlaps(self.taken):
            return False
        distances = np.hypot(*(self.middles - np.clip(self.middles, box.min, box.max)).T)
        is_nearest = int(distances.argmin()) == place
        return is_nearest and (crosses or not any(line.intersects_bbox(box, False) for line in self.lines))


def _move(text: Annotation, gap: float, side: tuple[int, int]) -> None:
    """Put a name on one side of its point, `gap` points from its middle."""
    across, up = side
    text.set_position((gap * across, gap * up))
    text.set_horizontalalignment(_ACROSS[across])
    text.set_verticalalignment(_UP[up])


def _round_values(low: float, high: float) -> list[float]:
    """Return a few round values from `low` to `high`, both above zero."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in _STEPS:
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= _FEWEST_TICKS:
            return ticks[:: ceil(len(ticks) / _MOST_TICKS)]
    values = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in np.asarray(values) if low <= tick <= high]
