"""A session as a model of lm-evaluation-harness: `simple_evaluate(model=QevalLM(session, tokenizer), ...)`.

The harness keeps its own tokenization rule (`TemplateLM`) and its own cutting of contexts that are too long; the
scoring is qeval's, with prefixes shared. Continuations are scored; text is not generated.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qeval.backends.base import Session
from qeval.errors import QevalError, UsageError
from qeval.progress import Advance
from qeval.score.choices import Score, score_pairs
from qeval.tasks.corpus import BosPolicy
from qeval.tasks.harness import Encoder
from qeval.types import TokenIds

_PART_PAIRS = 256
"""Pairs that are grouped by prefix at once; sorted before, so that those with a prefix in common stay together."""

_logger = logging.getLogger(__name__)


@register_model("qeval")
class QevalLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's model interface over a session and its tokenizer."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        bos: BosPolicy = "auto",
        batch_tokens: int = 2048,
        advance: Advance = lambda done: None,
    ) -> None:
        """`advance` is told the tokens that are done."""
        super().__init__()
        self.tokenizer = tokenizer
        self._session, self._encoder = session, Encoder(tokenizer, bos)
        self._batch_tokens, self._advance = batch_tokens, advance

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._special("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, else EOS, as in lm-eval's own `hf` model."""
        return self._special("bos_token_id", "eos_token_id")

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self._session.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; without `add_special_tokens`, BOS as the policy says unless the text spells it."""
        plain = add_special_tokens is False or (add_special_tokens is None and self._spells_bos(string))
        encoder = Encoder(self.tokenizer, "never") if plain else self._encoder
        return list(encoder.encode([string])[0])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods (nats) of whole texts, in windows of the context, each token scored once."""
        del disable_tqdm
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._score([pair for own in windows for pair in own]))
        totals = [sum(next(scores)[0] for _ in own) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: qeval scores given continuations.

        Raises:
            UsageError: always.
        """
        raise UsageError("qeval scores given continuations and does not generate text; take a multiple-choice task.")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **__: Any
    ) -> list[Score]:
        del disable_tqdm
        scores = self._score([self._fit(tuple(context), tuple(rest)) for _, context, rest in requests])
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _score(self, pairs: Sequence[tuple[TokenIds, TokenIds]]) -> list[Score]:
        """Scores in the order of `pairs`."""
        order = sorted(range(len(pairs)), key=lambda index: pairs[index])
        scores: dict[int, Score] = {}
        for start in range(0, len(order), _PART_PAIRS):
            part = order[start : start + _PART_PAIRS]
            values = score_pairs(self._session, [pairs[i] for i in part], self._batch_tokens, self._advance)
            scores.update(zip(part, values, strict=True))
        return [scores[index] for index in range(len(pairs))]

    def _fit(self, context: TokenIds, rest: TokenIds) -> tuple[TokenIds, TokenIds]:
        """Cut a context that is too long on the left, as lm-eval's `hf` model does, and warn of it.

        Raises:
            QevalError: there is nothing to score, or the continuation alone is longer than the context allows.
        """
        if not context or not 0 < len(rest) <= self.max_length:
            raise QevalError(
                f"A continuation of {len(rest)} tokens after {len(context)} can't be scored in a context of "
                f"{self.max_length} tokens."
            )
        spare = self.max_length + 1 - len(rest)
        if len(context) > spare:
            _logger.warning("A context of %d tokens is cut to its last %d.", len(context), spare)
        return context[-spare:], rest

    def _windows(self, text: str) -> Iterator[tuple[TokenIds, TokenIds]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for window in windows:
            context, rest = make_disjoint_window(window)
            yield tuple(context), tuple(rest)

    def _spells_bos(self, text: str) -> bool:
        """Return whether a text starts with the prefix token's written form; the harness then adds no second one."""
        return text.startswith(self.tokenizer.decode(self.prefix_token_id))

    def _special(self, *names: str) -> int:
        values = [value for name in names if (value := getattr(self.tokenizer, name)) is not None]
        if not values:
            raise UsageError("This tokenizer has neither a BOS nor an EOS token; lm-eval needs one to start from.")
        return int(values[0])
