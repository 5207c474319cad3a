"""Squares of rows and columns that share a scale: how their rows come together."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad


def over_tiles(values: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Return values [rows, blocks], none negative, reduced over each tile's rows and repeated for them.

    Args:
        values: By row and block.
        size: Rows of a tile; the last one may have fewer.
        reduce: `torch.amax` or `torch.sum`.
    """
    rows = len(values)
    by_tile = pad(values, (0, 0, 0, -rows % size)).reshape(-1, size, values.shape[1])
    return reduce(by_tile, dim=1).repeat_interleave(size, dim=0)[:rows]


def in_row_multiples(parts: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the rows of parts [rows_i, columns] again, in parts of whole tiles of `size` rows but for the last.

    >>> [len(part) for part in in_row_multiples([torch.ones(3, 1), torch.ones(6, 1)], 4)]
    [8, 1]
    """
    left: Tensor | None = None
    for part in parts:
        rows = part if left is None or not len(left) else torch.cat([left, part])
        whole = len(rows) // size * size
        left = rows[whole:]
        if whole:
            yield rows[:whole]
    if left is not None and len(left):
        yield left
