"""Prompts for greedy continuations: pieces of a corpus, all of one length, spread evenly over it."""

from collections.abc import Sequence

from qeval.errors import UsageError
from qeval.types import TokenIds


def prompts_of(ids: Sequence[int], count: int, length: int, bos: int | None) -> tuple[TokenIds, ...]:
    """Return `count` prompts of `length` tokens each, BOS included where there is one; no token is in two of them.

    There are fewer where the corpus repeats itself: no prompt is there twice.

    Args:
        ids: The token ids of the corpus.
        count: Prompts.
        length: Tokens of a prompt, BOS included.
        bos: The id of the BOS token; None for none.

    >>> prompts_of(range(10), 2, 3, None), prompts_of(range(10), 2, 3, 99)
    (((0, 1, 2), (5, 6, 7)), ((99, 0, 1), (99, 5, 6)))

    Raises:
        UsageError: The corpus is too short.
    """
    front = () if bos is None else (bos,)
    taken = length - len(front)
    if taken < 1:
        raise UsageError(
            f"A prompt of {length} tokens has room for the BOS token alone; --drift-prompt-tokens says it."
        )
    step = len(ids) // count
    if step < taken:
        raise UsageError(
            f"The corpus holds {len(ids)} tokens, fewer than {count} prompts of {taken}; give a longer --corpus "
            "or fewer --drift-prompts."
        )
    prompts = ((*front, *ids[place * step : place * step + taken]) for place in range(count))
    return tuple(dict.fromkeys(prompts))
