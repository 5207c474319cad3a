"""Prompts for greedy continuations: pieces of a corpus, all of one length, spread evenly over it."""

from collections.abc import Sequence

from qeval.errors import UsageError

Ids = tuple[int, ...]


def prompts_of(ids: Sequence[int], count: int, length: int, bos: int | None) -> tuple[Ids, ...]:
    """`count` prompts of `length` tokens each, BOS included where there is one; no token is in two of them.

    >>> prompts_of(range(10), 2, 3, None), prompts_of(range(10), 2, 3, 99)
    (((0, 1, 2), (5, 6, 7)), ((99, 0, 1), (99, 5, 6)))

    Raises:
        UsageError: the corpus is too short.
    """
    front = () if bos is None else (bos,)
    own = length - len(front)
    if own < 1:
        raise UsageError(
            f"A prompt of {length} tokens has room for the BOS token alone; --drift-prompt-tokens says it."
        )
    step = len(ids) // count
    if step < own:
        raise UsageError(
            f"The corpus holds {len(ids)} tokens, fewer than {count} prompts of {own}; give a longer --corpus or fewer "
            "--drift-prompts."
        )
    return tuple((*front, *ids[place * step : place * step + own]) for place in range(count))
