"""A text's token ids become windows; each says which of its positions are scored. Pure: ids in, windows out.

A position is an index into a window's tokens. A KL position is scored by the distribution after it; an NLL position
is a token that is predicted from those before it in the window. Five rules say which they are:

- Windows without overlap (stride == window): KL at every position, NLL from 1 on. A shorter tail is dropped.
- Overlapping windows (stride < window), as in the Hugging Face guide to perplexity: the first window is scored
  whole (NLL from 1), a later one where it is new, so each token of the text is scored once. The last window ends with
  the text and may be shorter.
- `second_half`, as llama.cpp's perplexity: windows without overlap, of which the logits at window/2 to window - 2 are
  scored (KL at these, NLL of the tokens after them). A shorter tail is dropped.
- `rolling`, as lm-evaluation-harness's rolling log-likelihood: each document's tokens are predicted once, `window` at
  a time, the first after an added token, every later window after one token of the one before; the last window is
  filled up with context. The last token of a window is a target alone, so that `window` tokens are run. KL where an
  NLL is predicted.
- BOS, where there is one, is never a target, and always counts inside the window's length, so no context is longer
  than `window`. `text` puts it once in front of the whole text. `window` puts it in front of each window, which then
  holds window - 1 tokens of the text; none is skipped. `replace` is llama.cpp's: once in front of the text, then in
  place of the first token of each window.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal

import numpy as np

from qeval.errors import UsageError

Scoring = Literal["new", "second_half", "rolling"]
BosPlacement = Literal["text", "window", "replace", "document"]


@dataclass(frozen=True)
class Window:
    """Tokens that are run as one sequence, BOS included, and the positions among them that are scored.

    `offset` is the index in the text's ids of the window's first token that is not an added BOS.
    """

    tokens: tuple[int, ...]
    offset: int
    kl_positions: tuple[int, ...]
    nll_positions: tuple[int, ...]

    @property
    def run_length(self) -> int:
        """The number of tokens that are run: those up to the last whose final state is wanted."""
        return max(*self.kl_positions[-1:], *(position - 1 for position in self.nll_positions[-1:]), 0) + 1


@dataclass(frozen=True)
class Windows:
    """The windows of one text, in its order.

    `available` counts them before any limit; `tokens_sha256` names the whole text's ids, without BOS; `documents` are
    those that the windows score.
    """

    windows: tuple[Window, ...]
    available: int
    tokens_sha256: str
    bos: BosPlacement | None
    documents: int = 1

    @property
    def kl_count(self) -> int:
        """The number of positions that have a KL."""
        return sum(len(window.kl_positions) for window in self.windows)

    @property
    def nll_count(self) -> int:
        """The number of positions that have an NLL."""
        return sum(len(window.nll_positions) for window in self.windows)

    @property
    def token_count(self) -> int:
        """The number of tokens that are run."""
        return sum(window.run_length for window in self.windows)


def make_windows(
    ids: Sequence[int],
    window: int,
    stride: int,
    *,
    scoring: Scoring = "new",
    bos: int | None = None,
    bos_placement: BosPlacement = "window",
    max_windows: int | None = None,
) -> Windows:
    """Cut the token ids of a text into windows.

    Args:
        ids: Token ids without special tokens.
        window: Tokens of a window at most, BOS included.
        stride: Tokens between the starts of two windows.
        scoring: Which positions of a window are scored.
        bos: The id of the BOS token; None for none.
        bos_placement: Where BOS goes.
        max_windows: Take the first so many.

    Raises:
        UsageError: The sizes don't fit each other, or the text is shorter than one window.

    >>> cut = make_windows(range(10, 16), window=4, stride=2)
    >>> [w.tokens for w in cut.windows], [w.nll_positions for w in cut.windows]
    ([(10, 11, 12, 13), (12, 13, 14, 15)], [(1, 2, 3), (2, 3)])
    """
    placement = None if bos is None else bos_placement
    _check_sizes(window, stride, scoring, placement, max_windows)
    if len(ids) + (placement is not None) < window:
        content = f"{len(ids)} tokens" + (" and a BOS" if placement else "")
        raise UsageError(
            f"The corpus holds {content}, fewer than one window of {window}; use a longer text or a smaller --window."
        )
    windows = tuple(_cut(tuple(ids), window, stride, scoring, bos, placement))
    return Windows(windows[:max_windows], len(windows), tokens_sha256(ids), placement)


def rolling_windows(
    documents: Sequence[Sequence[int]], window: int, *, prefix: int, max_windows: int | None
) -> Windows:
    """Cut documents into windows that score each token once.

    Args:
        documents: Token ids of each document, without special tokens.
        window: Tokens that are run at a time.
        prefix: The id that is put before the first token of each document.
        max_windows: Take as many documents as fit whole into so many windows.

    Raises:
        UsageError: The window leaves nothing, or no document fits whole into `max_windows`.

    >>> cut = rolling_windows([[10, 11, 12, 13, 14]], window=3, prefix=1, max_windows=None)
    >>> [w.tokens for w in cut.windows], [w.nll_positions for w in cut.windows]
    ([(1, 10, 11, 12), (11, 12, 13, 14)], [(1, 2, 3), (2, 3)])
    """
    _check_sizes(window, window, "rolling", None, max_windows)
    starts = accumulate((len(ids) for ids in documents), initial=0)
    by_document = [list(_roll(tuple(i), window, prefix, start)) for i, start in zip(documents, starts, strict=False)]

    # a document is scored whole or not at all
    ends = list(accumulate(map(len, by_document)))
    whole = sum(max_windows is None or end <= max_windows for end in ends)
    if not whole:
        raise UsageError(f"--max-windows {max_windows} holds no whole document; its first takes more windows.")
    taken = tuple(chain.from_iterable(by_document[:whole]))
    return Windows(taken, ends[-1], tokens_sha256(list(chain.from_iterable(documents))), "document", whole)


def tokens_sha256(ids: Sequence[int]) -> str:
    """Return the sha256 of token ids, as little-endian 64-bit integers, in hex."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()


def _check_sizes(window: int, stride: int, scoring: Scoring, bos: BosPlacement | None, max_windows: int | None) -> None:
    smallest = 3 if bos == "window" or scoring == "second_half" else 2
    if window < smallest:
        raise UsageError(f"A window of {window} tokens leaves nothing to score; --window must be {smallest} or more.")
    if not 1 <= stride <= window:
        raise UsageError(f"--stride {stride} must lie between 1 and the window, {window}: no token may be skipped.")
    if scoring == "second_half" and stride != window:
        raise UsageError(f"Scoring the second half needs windows without overlap, not a stride of {stride}.")
    if bos == "replace" and stride != window:
        raise UsageError(f"Replacing first tokens by BOS needs windows without overlap, not a stride of {stride}.")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"--max-windows {max_windows} leaves nothing to score; it must be 1 or more.")


def _cut(
    ids: tuple[int, ...], window: int, stride: int, scoring: Scoring, bos: int | None, placement: BosPlacement | None
) -> Iterator[Window]:
    marker = () if bos is None else (bos,)
    front = marker if placement == "window" else ()
    lead = marker if placement in ("text", "replace") else ()
    stream = lead + ids
    length = window - len(front)
    overlapping = stride < window
    step = stride if overlapping else length
    for begin, end, new in _spans(len(stream), length, step, keep_tail=overlapping):
        replaced = marker if placement == "replace" else ()
        tokens = front + replaced + stream[begin + len(replaced) : end]
        offset = max(begin + len(replaced) - len(lead), 0)
        first_scored = len(tokens) - new if overlapping and begin else 0
        yield Window(tokens, offset, *_scored(len(tokens), first_scored, scoring))


def _roll(ids: tuple[int, ...], window: int, prefix: int, start: int) -> Iterator[Window]:
    """Yield one document's windows; `start` is where it begins among all documents' ids."""
    stream = (prefix, *ids)
    for begin in range(0, len(ids), window):
        end = min(begin + window, len(ids))  # of the targets, which stand one place later in the stream
        first = max(end - window, 0)
        tokens = stream[first : end + 1]
        targets = tuple(range(begin + 1 - first, end + 1 - first))
        yield Window(tokens, start + max(first - 1, 0), tuple(p - 1 for p in targets), targets)


def _spans(total: int, length: int, step: int, *, keep_tail: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, how many at the end are new) of each window over `total` tokens."""
    covered = 0
    for begin in range(0, total, step):
        end = min(begin + length, total)
        if end - begin < length and not keep_tail:
            return
        yield begin, end, end - covered
        covered = end
        if end == total:
            return


def _scored(count: int, first: int, scoring: Scoring) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the KL and NLL positions of a window of `count` tokens, of which those from `first` on are new."""
    if scoring == "second_half":
        middle = count // 2
        return tuple(range(middle, count - 1)), tuple(range(middle + 1, count))
    return tuple(range(first, count)), tuple(range(max(first, 1), count))
