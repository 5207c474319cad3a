"""A session as a model of lm-evaluation-harness: `simple_evaluate(model=QevalLM(session, tokenizer), ...)`.

The harness keeps its own tokenization rule (`TemplateLM`) and its own cutting of contexts that are too long; the
scoring is qeval's, with prefixes shared, and so are greedy answers, in batches.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from qeval.backends.base import Session
from qeval.progress import Advance
from qeval.score.choices import Score, score_pairs
from qeval.score.generate import Generator, Prompt
from qeval.tasks.corpus import BosPolicy
from qeval.tasks.harness_text import HarnessText, ending_of
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
        stops: Collection[int] = (),
    ) -> None:
        """Take a session and its tokenizer.

        Args:
            session: What scores and generates.
            tokenizer: The model's.
            bos: Whether contexts begin with BOS.
            batch_tokens: Tokens a batch.
            advance: Is told the tokens that are done.
            stops: Ids that end an answer beside the tokenizer's EOS: those of the model's generation config.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self._session, self._text = session, HarnessText(tokenizer, bos, session.max_length)
        self._batch_tokens, self._advance, self._stops = batch_tokens, advance, frozenset(stops)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._text.special("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, else EOS, as in lm-eval's own `hf` model."""
        return self._text.prefix_token

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self._session.max_length

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, by which the harness keeps prompts under a chat template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation under the tokenizer's chat template."""
        return self._text.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; without `add_special_tokens`, BOS as the policy says unless the text spells it."""
        return list(self._text.encode(string, add_special_tokens))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods (nats) of whole texts, in windows of the context, each token scored once."""
        del disable_tqdm
        windows = [list(self._text.windows(request.args[0])) for request in requests]
        scores = iter(self._score([pair for own in windows for pair in own]))
        totals = [sum(next(scores)[0] for _ in own) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy answers, each up to its stop strings or its most tokens.

        Raises:
            UsageError: A request asks for sampling, or its answer leaves no room for its prompt.
        """
        del disable_tqdm
        prompts, cut = [], 0
        for request in requests:
            context, settings = request.args
            ending = ending_of(settings, "generate_until")
            pair = self._text.prompt(context, ending.tokens)
            cut += pair.cut > 0
            prompts.append(Prompt(pair.context, ending))
        if cut:
            _logger.warning("%d prompts are cut on the left to leave room for their answers.", cut)
        generator = Generator(self._session, self.tokenizer, self._stops, self._batch_tokens)
        answers = [answer.text for answer in generator.answers(prompts, self._advance)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

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
            UsageError: there is nothing to score, or the continuation alone is longer than the context allows.
        """
        pair = self._text.fit(context, rest)
        if pair.cut:
            _logger.warning("A context of %d tokens is cut to its last %d.", len(context), len(pair.context))
        return pair.context, pair.rest
