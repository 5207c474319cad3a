"""Spikes: where along a text the loss is large, a few tokens in a row, with what they say."""

from collections.abc import Iterator

import numpy as np

from qeval.report.align import TokenRows
from qeval.report.explain.model import SpanLoss
from qeval.report.explain.tokens import check_window_text
from qeval.stats.bootstrap import Floats, Ints
from qeval.store.texts import Texts

HOT_SHARE = 0.01
"""The share of positions, those with the largest KL, that spans are made of."""
GAP = 2
"""Positions below that which a span may hold between two of its own."""
_BEFORE = 24


def worst_spans(rows: TokenRows, texts: Texts | None, count: int) -> list[SpanLoss]:
    """Return the `count` spans with the largest summed KL.

    A span begins and ends with a position whose KL is among the largest hundredth, and holds at most two others in a
    row between such ones.

    Args:
        rows: A variant's, all of whose KL is finite.
        texts: The run's; None where it kept none.
        count: The most spans to return.

    Raises:
        BrokenRecordError: The run's texts are of other tokens than its rows.
    """
    scored = np.flatnonzero(rows.scored["kl_nats"])
    kl = rows.values["kl_nats"][scored]
    spans = list(_spans(kl, rows.windows[scored], rows.positions[scored]))
    sums = [float(kl[start:end].sum()) for start, end in spans]
    order = sorted(range(len(spans)), key=lambda place: (-sums[place], place))[:count]
    return [_span(rows, texts, scored[slice(*spans[place])], sums[place]) for place in order]


def _spans(kl: Floats, windows: Ints, positions: Ints) -> Iterator[tuple[int, int]]:
    """Yield the ends (start, end) of every span among the scored positions."""
    if not kl.size:
        return
    few = max(1, round(HOT_SHARE * kl.size))
    edge = np.partition(kl, -few)[-few]
    hot = np.flatnonzero((kl >= edge) & (kl > 0))
    if not hot.size:
        return
    apart = (np.diff(windows[hot]) != 0) | (np.diff(positions[hot]) > GAP + 1)
    for run in np.split(hot, np.flatnonzero(apart) + 1):
        yield int(run[0]), int(run[-1]) + 1


def _span(rows: TokenRows, texts: Texts | None, at: Ints, total: float) -> SpanLoss:
    window, first, last = int(rows.windows[at[0]]), int(rows.positions[at[0]]), int(rows.positions[at[-1]])
    text = texts.window(window) if texts else None
    if text is not None:
        check_window_text(text, rows, int(at[0]))
    return SpanLoss(
        window=window,
        first=first,
        last=last,
        kl_nats=total,
        largest_kl_nats=float(rows.values["kl_nats"][at].max()),
        before="".join(text.texts[max(0, first + 1 - _BEFORE) : first + 1]) if text else None,
        text="".join(text.texts[first + 1 : last + 2]) if text else None,
    )
