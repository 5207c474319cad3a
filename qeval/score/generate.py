"""Greedy answers in batches: each prompt's own, ended by texts or tokens, in halves where memory lacks for a batch."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm_eval.models.utils import postprocess_generated_text

from qeval.backends.base import Session
from qeval.backends.decoding import Decoding, Greedy
from qeval.backends.generation import IsDone
from qeval.errors import is_out_of_memory
from qeval.models.device import release_cached
from qeval.progress import Advance
from qeval.tasks.harness_text import Ending
from qeval.types import TokenIds

_LARGEST_BATCH = 64
_LEAST_TOKENS = 16384
"""Tokens of a batch at least, answers included: a step costs a pass over the weights, whatever stands in the batch."""
_LIKELY_TOKENS = 512
"""Tokens of an answer that a batch has room for; few are longer, and memory that lacks halves a batch."""
_LOOK_BACK = 2
"""Tokens more than a stop string's own in which it is looked for: it may be spelled by others."""


class Prompt(NamedTuple):
    """A prompt, and what ends its answer."""

    tokens: TokenIds
    ending: Ending


class GeneratedAnswer(NamedTuple):
    """An answer's text up to what ended it; `is_cut`: nothing did, and it reached its most tokens."""

    text: str
    tokens: int
    is_cut: bool


def generate_fitting(
    session: Session,
    prompts: Sequence[TokenIds],
    count: int,
    decoding_of: Callable[[Sequence[TokenIds]], Decoding],
    stops: Collection[int],
    *,
    is_done: IsDone | None = None,
) -> list[TokenIds]:
    """Return what each prompt goes on with, as `Session.generate`, in halves where memory lacks for all at once.

    Args:
        session: What generates.
        prompts: One batch.
        count: The most tokens of an answer.
        decoding_of: Returns what picks the next tokens of some prompts.
        stops: Ids that end an answer.
        is_done: Says of an answer's tokens so far whether they end it.
    """
    try:
        return session.generate(prompts, count, decoding_of(prompts), stops, is_done)
    except RuntimeError as error:
        if len(prompts) == 1 or not is_out_of_memory(error):
            raise
    release_cached()
    middle = len(prompts) // 2
    halves = (prompts[:middle], prompts[middle:])
    return [
        said for half in halves for said in generate_fitting(session, half, count, decoding_of, stops, is_done=is_done)
    ]


@dataclass(frozen=True, eq=False)
class Generator:
    """A session that answers prompts greedily, as lm-eval's `hf` model does one prompt at a time.

    Attributes:
        session: What generates.
        tokenizer: The model's.
        stops: Ids that end an answer beside the tokenizer's EOS.
        batch_tokens: Tokens of a batch of other work; a batch of answers holds no fewer than 16,384.
    """

    session: Session
    tokenizer: Any
    stops: frozenset[int]
    batch_tokens: int

    def answers(self, prompts: Sequence[Prompt], advance: Advance) -> list[GeneratedAnswer]:
        """Return the answer to each prompt; `advance` is told the tokens of the prompts that are done."""
        found: dict[Prompt, GeneratedAnswer] = {}
        for ending in dict.fromkeys(prompt.ending for prompt in prompts):
            stop = _StopTexts(self.tokenizer, self._ends, ending)
            for batch in self._batches({prompt.tokens for prompt in prompts if prompt.ending == ending}, ending):
                said = generate_fitting(
                    self.session, batch, ending.tokens, lambda _: Greedy(), self._ends, is_done=stop.is_reached
                )
                found |= {Prompt(t, ending): stop.answer(tokens) for t, tokens in zip(batch, said, strict=True)}
                advance(sum(map(len, batch)))
        return [found[prompt] for prompt in prompts]

    @property
    def _ends(self) -> frozenset[int]:
        eos = self.tokenizer.eos_token_id
        return self.stops if eos is None else self.stops | {int(eos)}

    def _batches(self, prompts: Collection[TokenIds], ending: Ending) -> Iterator[list[TokenIds]]:
        """Yield prompts of like length together, the longest first."""
        waiting = sorted(prompts, key=lambda prompt: (-len(prompt), prompt))
        while waiting:
            tokens = len(waiting[0]) + min(ending.tokens, _LIKELY_TOKENS)
            count = max(1, min(max(self.batch_tokens, _LEAST_TOKENS) // tokens, _LARGEST_BATCH))
            yield waiting[:count]
            waiting = waiting[count:]


class _StopTexts:
    """The stop strings of one ending, looked for in the last tokens of an answer."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], ending: Ending) -> None:
        self._tokenizer, self._ends, self._ending = tokenizer, ends, ending
        eos = tokenizer.eos_token_id
        spelled = [] if eos is None else [tokenizer.decode([eos])]  # by other tokens it ends an answer too
        self._texts = [text for text in (*ending.until, *spelled) if text]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self._texts]
        self._window = max(lengths, default=0) + _LOOK_BACK

    def is_reached(self, tokens: Sequence[int]) -> bool:
        """Return whether a stop string stands among the last tokens."""
        if not self._texts:
            return False
        tail = self._tokenizer.decode(list(tokens[-self._window :]))
        return any(text in tail for text in self._texts)

    def answer(self, tokens: TokenIds) -> GeneratedAnswer:
        """Return the text before the first stop string, special tokens left out."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        has_ended = bool(tokens) and (tokens[-1] in self._ends or self.is_reached(tokens))
        kept = postprocess_generated_text(text, list(self._texts), None)
        return GeneratedAnswer(kept, len(tokens), len(tokens) >= self._ending.tokens and not has_ended)
