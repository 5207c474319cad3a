"""Spikes of the loss against a slow definition, position by position."""

import numpy as np

from qeval.report.align import TokenRows
from qeval.report.explain.spans import GAP, worst_spans
from qeval.store.texts import WindowText

WINDOWS, LENGTH = 3, 300


class Written:
    """Texts of windows whose tokens are their own numbers."""

    def window(self, window):
        tokens = tuple(range(window * 1000, window * 1000 + LENGTH + 1))
        return WindowText(window, tokens, tuple(f"{token} " for token in tokens))


def rows_of(kl):
    windows = np.repeat(np.arange(WINDOWS), LENGTH)
    positions = np.tile(np.arange(LENGTH), WINDOWS)
    return TokenRows(
        windows, positions, windows * 1000 + positions, {"kl_nats": kl}, {"kl_nats": np.ones(len(kl), np.bool_)}
    )


def slow_spans(kl):
    """Every span, by walking over the windows: (window, first, last, sum)."""
    edge, found = sorted(kl)[-round(0.01 * len(kl))], []
    for window in range(WINDOWS):
        inside = kl[window * LENGTH : (window + 1) * LENGTH]
        hot = [place for place in range(LENGTH) if inside[place] >= edge]
        while hot:
            last = hot[0]
            while any(last < place <= last + GAP + 1 for place in hot):
                last = min(place for place in hot if place > last)
            found.append((window, hot[0], last, sum(inside[hot[0] : last + 1])))
            hot = [place for place in hot if place > last]
    return sorted(found, key=lambda span: -span[3])


def test_spans_are_runs_of_the_worst_positions():
    generator = np.random.default_rng(3)
    kl = generator.exponential(size=WINDOWS * LENGTH)
    kl[[LENGTH - 1, LENGTH]] = 50.0  # neighbours among the rows, in two windows
    kl[[100, 103, 106]] = 40.0  # two others between
    kl[[200, 204]] = 30.0  # three others between
    found = worst_spans(rows_of(kl), Written(), 50)
    expected = slow_spans(kl)
    assert [(s.window, s.first, s.last) for s in found] == [span[:3] for span in expected]
    assert np.allclose([s.kl_nats for s in found], [span[3] for span in expected])
    assert (0, 100, 106) in [span[:3] for span in expected]
    assert {(0, 200, 200), (0, 204, 204)} <= {span[:3] for span in expected}


def test_the_text_of_a_span_is_what_its_positions_predict():
    kl = np.full(WINDOWS * LENGTH, 0.01)
    kl[LENGTH + 7 : LENGTH + 16] = 5.0
    (span,) = worst_spans(rows_of(kl), Written(), 1)
    assert (span.window, span.first, span.last) == (1, 7, 15)
    assert span.text == "".join(f"{1000 + place} " for place in range(8, 17))
    assert span.before.endswith("1007 ")


def test_a_variant_that_loses_nothing_has_no_span():
    assert worst_spans(rows_of(np.zeros(WINDOWS * LENGTH)), None, 5) == []
