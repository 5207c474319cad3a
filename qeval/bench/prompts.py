"""Prompts of real text: each sequence of a batch another passage, each of exactly the length asked for."""

from collections.abc import Sequence

import numpy as np

from qeval.bench.engines.base import Tokens
from qeval.errors import UsageError


def passages(ids: Sequence[int], batch: int, length: int, bos: int | None = None) -> Tokens:
    """Return prompts [batch, length] of a text's token ids, their beginnings spread over it, `bos` first in each.

    >>> passages(range(100, 110), 2, 4, bos=1).tolist()
    [[1, 100, 101, 102], [1, 104, 105, 106]]

    Raises:
        UsageError: The text has not so many different passages.
    """
    front = () if bos is None else (bos,)
    count = length - len(front)
    room = len(ids) - count
    if room < batch - 1 or count < 0:
        raise UsageError(
            f"The corpus holds {len(ids)} tokens, too few for {batch} different prompts of {length}; give a longer one."
        )
    begins = [(room + 1) * place // batch for place in range(batch)]
    return np.asarray([(*front, *ids[begin : begin + count]) for begin in begins], np.int64)
