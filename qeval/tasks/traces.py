"""Traces: text that every model is asked along, token by token, after a prompt."""

from dataclasses import dataclass
from typing import Literal

from qeval.tasks.windows import Window
from qeval.types import TokenIds

TracePiece = Literal["chain", "answer", "after", "call"]
"""The pieces of a trace that have rows: a chain of thought, an answer, what follows it; a call of a function."""
CHAIN: TracePiece = "chain"
ANSWER: TracePiece = "answer"
AFTER: TracePiece = "after"
CALL: TracePiece = "call"


@dataclass(frozen=True)
class Trace:
    """A prompt and what is forced after it.

    Attributes:
        item: The number of its question or prompt; traces of one are one cluster.
        draw: Which of several traces of the item it is, from 0.
        first: The place of the first forced token.
        window: The tokens; its KL positions are those whose states are wanted.
        parts: Which piece the states are of, in order, with their number.
        masks: The tokens that a grammar allows at each state, packed as `metrics.traces.Probes` has them.
    """

    item: int
    draw: int
    first: int
    window: Window
    parts: tuple[tuple[TracePiece, int], ...]
    masks: bytes | None = None

    @property
    def forced(self) -> TokenIds:
        """The tokens behind the prompt's."""
        return self.window.tokens[self.first :]


def reasoning_trace(item: int, asked: TokenIds, chain: TokenIds, cue: TokenIds, answer: TokenIds) -> Trace:
    """Return a chain of thought, the words that ask for the answer, and the answer; the cue has no rows.

    Args:
        item: The number of the question.
        asked: The question's tokens.
        chain: The baseline's chain of thought.
        cue: The words before the answer.
        answer: The right answer.

    >>> reasoning_trace(0, (1, 2), (3, 4), (5,), (6,)).window.kl_positions
    (1, 2, 4, 5)
    """
    start, behind = len(asked), len(asked) + len(chain) + len(cue)
    tokens = (*asked, *chain, *cue, *answer)
    places = (*range(start - 1, start - 1 + len(chain)), *range(behind - 1, len(tokens)))
    parts = ((CHAIN, len(chain)), (ANSWER, len(answer)), (AFTER, 1))
    return Trace(item, 0, start, Window(tokens, 0, tuple(sorted({*places})), ()), parts)


def call_trace(item: int, draw: int, asked: TokenIds, call: TokenIds, masks: bytes) -> Trace:
    """Return a call of a function, and what its grammar allows at each of its tokens.

    Args:
        item: The number of the prompt.
        draw: Which of the prompt's calls it is.
        asked: The prompt's tokens, with those that open the call.
        call: The call's tokens.
        masks: The allowed tokens, packed.
    """
    places = tuple(range(len(asked) - 1, len(asked) + len(call) - 1))
    return Trace(item, draw, len(asked), Window((*asked, *call), 0, places, ()), ((CALL, len(call)),), masks)
