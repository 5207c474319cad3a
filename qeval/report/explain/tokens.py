"""The positions with the largest KL, in their context."""

from typing import NamedTuple

import numpy as np

from qeval.errors import BrokenRecordError
from qeval.report.align import TokenRows
from qeval.report.explain.model import TokenLoss, TokensLoss
from qeval.stats.bootstrap import Floats, Ints
from qeval.store.texts import Texts, WindowText

_LEVELS = (0.001, 0.01, 0.1)
_BEFORE = 24
_AFTER = 10


def tokens_loss(rows: TokenRows, baseline: TokenRows, texts: Texts | None, count: int) -> TokensLoss:
    """Return the `count` positions with the largest KL, and how much of all KL the worst ones hold.

    All KL values must be finite.

    Raises:
        BrokenRecordError: the run's texts are of other tokens than its rows.
    """
    scored = np.flatnonzero(rows.scored["kl_nats"])
    kl = rows.values["kl_nats"][scored]
    counts = [max(1, round(level * len(kl))) for level in _LEVELS]
    ranked = _largest(kl, max(count, *counts))
    total = float(kl.sum())
    return TokensLoss(
        positions=len(kl),
        mean_kl_nats=float(kl.mean()),
        worst_levels=list(_LEVELS),
        worst_shares=[float(kl[ranked[:few]].sum()) / total if total else 0.0 for few in counts],
        worst=[_token(rows, baseline, texts, int(at)) for at in scored[ranked[:count]]],
    )


def _largest(values: Floats, count: int) -> Ints:
    """Return where the `count` largest values are, the largest first, equal ones in their order."""
    edge = np.partition(values, -count)[-count] if count < len(values) else -np.inf
    above = np.flatnonzero(values >= edge)
    return above[np.argsort(-values[above], kind="stable")][:count]


class _Following(NamedTuple):
    """The token after a position, where it is known, and both models' probability of it, where scored."""

    token: int | None
    baseline: float | None
    variant: float | None


def _token(rows: TokenRows, baseline: TokenRows, texts: Texts | None, at: int) -> TokenLoss:
    window, position = int(rows.windows[at]), int(rows.positions[at])
    text = texts.window(window) if texts else None
    if text is not None:
        check_window_text(text, rows, at)
    following = _following(rows, baseline, at, text)
    place = position + 1

    return TokenLoss(
        window=window,
        position=position,
        token=int(rows.tokens[at]),
        kl_nats=float(rows.values["kl_nats"][at]),
        top1_agreement=bool(rows.values["top1_agreement"][at]),
        before="".join(text.texts[max(0, place - _BEFORE) : place]) if text else None,
        next=(text.texts[place] if place < len(text.texts) else "") if text else None,
        after="".join(text.texts[place + 1 : place + 1 + _AFTER]) if text else None,
        next_token=following.token,
        baseline_probability=following.baseline,
        variant_probability=following.variant,
    )


def _following(rows: TokenRows, baseline: TokenRows, at: int, text: WindowText | None) -> _Following:
    after, position = at + 1, int(rows.positions[at]) + 1
    there = after < len(rows.windows) and rows.windows[after] == rows.windows[at] and rows.positions[after] == position
    if not there:
        return _Following(text.tokens[position] if text and position < len(text.tokens) else None, None, None)
    token = int(rows.tokens[after])
    if not (rows.scored["nll"][after] and baseline.scored["nll"][after]):
        return _Following(token, None, None)
    p, q = (float(np.exp(-side.values["nll"][after])) for side in (baseline, rows))
    return _Following(token, p, q)


def check_window_text(text: WindowText, rows: TokenRows, at: int) -> None:
    """Refuse a window's texts that are of other tokens than its rows.

    Raises:
        BrokenRecordError: The token of row `at` is another.
    """
    position = int(rows.positions[at])
    if position >= len(text.tokens) or text.tokens[position] != rows.tokens[at]:
        raise BrokenRecordError(
            f"The texts of window {text.window} are of other tokens than its rows; run the same command again."
        )
