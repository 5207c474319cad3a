"""Texts of lm-evaluation-harness as token ids, by the rules of its `hf` model: BOS, what is cut, the chat template.

A continuation's ids are what follows the context's in the encoding of both together; spaces that end a context go to
its continuation. What is too long is cut on the left, and counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qeval.errors import UsageError
from qeval.parsing import error_reason
from qeval.tasks.corpus import BosPolicy, bos_token
from qeval.tasks.prompt_form import PromptForm
from qeval.types import TokenIds

DEFAULT_TOKENS = 256
"""Tokens of an answer where a task says nothing: the harness's own default."""
_GREEDY = {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k"}
"""Settings that leave a greedy answer as it is, or are obeyed."""


class Ending(NamedTuple):
    """The texts that end an answer, and the most tokens that it has."""

    until: tuple[str, ...]
    tokens: int


class CutPair(NamedTuple):
    """A context and its continuation, and the tokens that were cut off the context."""

    context: TokenIds
    rest: TokenIds
    cut: int


@dataclass(frozen=True)
class Encoder:
    """A tokenizer under a BOS policy."""

    tokenizer: Any
    bos: BosPolicy

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of texts, BOS in front where the policy says so, exactly once."""
        first = bos_token(self.tokenizer, self.bos)
        ids = self.tokenizer(list(texts), add_special_tokens=self.bos == "auto", verbose=False)["input_ids"]
        if self.bos == "always" and first is not None:
            return [(first, *sequence) for sequence in ids]
        return [tuple(sequence) for sequence in ids]

    def pairs(self, arguments: Sequence[tuple[str, str]]) -> list[tuple[TokenIds, TokenIds]]:
        """Return contexts and continuations as ids; spaces that end a context go to its continuation."""
        moved = [(c.rstrip(), c[len(c.rstrip()) :] + rest) if c.strip() else (c, rest) for c, rest in arguments]
        texts = list(dict.fromkeys(text for context, rest in moved for text in (context, context + rest)))
        ids = dict(zip(texts, self.encode(texts), strict=True))  # choices share their context: it is encoded once
        return [(ids[context], ids[context + rest][len(ids[context]) :]) for context, rest in moved]


@dataclass(frozen=True)
class HarnessText:
    """A tokenizer under a BOS policy and a model's context, as the harness uses them."""

    tokenizer: Any
    bos: BosPolicy
    max_length: int

    @property
    def prefix_token(self) -> int:
        """The token that stands for an empty context: BOS, else EOS.

        Raises:
            UsageError: The tokenizer has neither.
        """
        return self.special("bos_token_id", "eos_token_id")

    def special(self, *names: str) -> int:
        """Return the first special token of these names that there is.

        Raises:
            UsageError: There is none.
        """
        values = [value for name in names if (value := getattr(self.tokenizer, name)) is not None]
        if not values:
            raise UsageError("This tokenizer has neither a BOS nor an EOS token; lm-eval needs one to start from.")
        return int(values[0])

    def encode(self, text: str, add_special_tokens: bool | None = None) -> TokenIds:
        """Return a text's ids; without `add_special_tokens`, BOS as the policy says unless the text spells it."""
        is_plain = add_special_tokens is False or (add_special_tokens is None and self._spells_bos(text))
        return self._ids(text, is_plain=is_plain)

    def pair(self, context: str, continuation: str) -> CutPair:
        """Return the ids of a context and its continuation, which fit the model's context.

        Raises:
            UsageError: There is nothing to score, or the continuation alone is too long.
        """
        if context == "":
            alone, first = self.encode(continuation, add_special_tokens=False), self.prefix_token
            return self.fit((first,), alone) if alone[:1] != (first,) else self.fit(alone[:1], alone[1:])
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context)
        return self.fit(before, self.encode(context + continuation)[len(before) :])

    def fit(self, context: TokenIds, rest: TokenIds) -> CutPair:
        """Return a pair whose context is cut on the left until both fit: the last token is predicted, never fed.

        Raises:
            UsageError: As `pair`.
        """
        if not context or not 0 < len(rest) <= self.max_length:
            raise UsageError(
                f"A continuation of {len(rest)} tokens after {len(context)} can't be scored in a context of "
                f"{self.max_length} tokens."
            )
        spare = self.max_length + 1 - len(rest)
        return CutPair(context[-spare:], rest, max(0, len(context) - spare))

    def windows(self, text: str) -> Iterator[tuple[TokenIds, TokenIds]]:
        """Yield a text in windows of the model's context as pairs, each of its tokens scored once."""
        windows = get_rolling_token_windows(
            token_list=list(self.encode(text)),
            prefix_token=self.prefix_token,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for window in windows:
            context, rest = make_disjoint_window(window)
            yield tuple(context), tuple(rest)

    def prompt(self, text: str, tokens: int) -> CutPair:
        """Return a prompt that leaves room for an answer of so many tokens, cut on the left where it must be.

        Raises:
            UsageError: The model's context holds no prompt beside such an answer, or the prompt is empty.
        """
        room = self.max_length - tokens
        if room <= 0:
            raise UsageError(
                f"Answers of up to {tokens} tokens (max_gen_toks) leave no room for a prompt in the model's context of "
                f"{self.max_length}."
            )
        bos = self.tokenizer.bos_token
        ids = self._ids(text, is_plain=bos is not None and text.startswith(bos))
        if not ids:
            raise UsageError("A prompt has no tokens.")
        return CutPair(ids[-room:], (), max(0, len(ids) - room))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation under the chat template; as the harness does, without a system turn that it refuses.

        Raises:
            UsageError: There is no template, or it fails.
        """
        if not self.tokenizer.chat_template:
            raise UsageError("This model has no chat template; leave --apply-chat-template out.")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except TemplateError as error:
            without = [message for message in messages if message["role"] != "system"]
            if len(without) == len(messages):
                raise UsageError(
                    f"The model's chat template can't be used for a task's prompt: {error_reason(error)}."
                ) from error
            return self.render(without, add_generation_prompt)
        return str(text)

    def _ids(self, text: str, *, is_plain: bool) -> TokenIds:
        return Encoder(self.tokenizer, "never" if is_plain else self.bos).encode([text])[0]

    def _spells_bos(self, text: str) -> bool:
        """Return whether a text starts with the prefix token's written form; the harness then adds no second one."""
        return text.startswith(self.tokenizer.decode(self.prefix_token))


def ending_of(settings: Mapping[str, Any], task: str) -> Ending:
    """Return what ends a greedy answer, from a task's generation settings.

    Args:
        settings: As the harness hands them to models.
        task: The task, for the error.

    Raises:
        UsageError: They ask for sampling, or for something else that changes an answer.
    """
    normal = normalize_gen_kwargs(dict(settings), DEFAULT_TOKENS)
    temperature = float(normal.get("temperature", 0.0))
    if normal["do_sample"] and temperature != 0:
        raise UsageError(
            f"Task '{task}' samples its answers (do_sample, temperature {temperature:g}), and a difference of "
            "two samples is noise first; copy its YAML with do_sample: false, or score it with lm-eval and use "
            "`qeval import`."
        )
    if others := sorted(set(normal) - _GREEDY):
        raise UsageError(f"Task '{task}' sets {', '.join(others)}, which qeval's greedy answers do not follow.")
    return Ending(tuple(str(each) for each in normal["until"]), int(normal["max_gen_toks"]))


def form_options(form: PromptForm, text: HarnessText) -> dict[str, Any]:
    """Return a form of prompts as the harness's functions take it; nothing where it is plain."""
    options: dict[str, Any] = {} if form.system is None else {"system_instruction": form.system}
    if form.chat:
        options |= {
            "apply_chat_template": True, "fewshot_as_multiturn": form.multiturn, "chat_template": text.render,
        }  # fmt: skip
    return options
