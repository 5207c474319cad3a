"""A model's chat template: prompts under it as token ids, and the markers by which it tells thinking from answering.

A template may ask for the day (`strftime_now`, `date_string`). It is always the same one here, so that the same prompts
are the same tokens tomorrow.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qeval.errors import UsageError
from qeval.parsing import error_reason
from qeval.tasks.chat_prompts import Message, ToolSchema
from qeval.tasks.corpus import encode, read_text

_DAY = {"%Y": "2025", "%y": "25", "%m": "01", "%d": "01", "%B": "January", "%b": "Jan", "%A": "Wednesday", "%a": "Wed"}
"""The text that a template's codes of the date become."""
_DATE = "01 Jan 2025"
_CLOCK = "".join(f"| replace('{code}', '{part}') " for code, part in _DAY.items())
_SAME_DAY = f"{{%- macro strftime_now(format) -%}}{{{{ format {_CLOCK}}}}}{{%- endmacro %}}\n"
"""Jinja that stands for the clock which transformers gives to templates."""
_TURN = "A plain answer"


class Markers(NamedTuple):
    """The texts between which a model thinks."""

    begin: str
    end: str


_MARKERS = (
    Markers("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, GLM, MiniMax
    Markers("[THINK]", "[/THINK]"),  # Magistral
    Markers("<seed:think>", "</seed:think>"),  # Seed-OSS
    Markers("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of conversations, and the name of the file that it was given in; None: the model's own."""

    text: str
    file: str | None

    @property
    def sha256(self) -> str:
        """The sha256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def takes_tools(self) -> bool:
        """Return whether the template says anything of functions to call."""
        return "tools" in self.text

    @property
    def markers(self) -> Markers | None:
        """The markers of thinking that the template itself names, or None."""
        return next((each for each in _MARKERS if each.begin in self.text and each.end in self.text), None)

    def render(self, tokenizer: Any, messages: Sequence[Message], tools: Sequence[ToolSchema], where: str) -> str:
        """Return a conversation as text that the model's answer follows.

        Args:
            tokenizer: The model's, which names special tokens.
            messages: The conversation so far.
            tools: What the model may call.
            where: What an error calls the conversation.

        Raises:
            UsageError: The template refuses it, or is none.
        """
        return self._render(tokenizer, messages, where, tools=list(tools) or None, add_generation_prompt=True)

    def render_whole(self, tokenizer: Any, messages: Sequence[Message], tools: Sequence[ToolSchema], where: str) -> str:
        """Return a conversation as text with nothing after it; the arguments are those of `render`.

        Raises:
            UsageError: As `render`.
        """
        return self._render(tokenizer, messages, where, tools=list(tools))

    def end_of_turn(self, tokenizer: Any) -> int | None:
        """Return the special token that the template puts behind an answer, or None where it puts another text there.

        Raises:
            UsageError: The template is none.
        """
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _TURN}]
        rest = self._render(tokenizer, messages, "a plain conversation").partition(_TURN)[2].lstrip()
        ids = encode(tokenizer, rest)
        return (
            ids[0] if ids and ids[0] in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) else None
        )

    def _render(self, tokenizer: Any, messages: Sequence[Message], where: str, **options: Any) -> str:
        name = f"--template {self.file}" if self.file else "The model's chat template"
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=_SAME_DAY + self.text if "strftime_now" in self.text else self.text,
                tokenize=False,
                date_string=_DATE,
                **options,
            )
        except Exception as error:  # a template raises whatever its expressions do
            raise UsageError(f"{name} can't be used for {where}: {error_reason(error)}.") from error
        return str(text)


def template_of(tokenizer: Any, file: Path | None) -> ChatTemplate:
    """Return the template in a file, else the tokenizer's own.

    Raises:
        UsageError: The file can't be read, or there is none of either.
    """
    if file is not None:
        if not file.is_file():
            raise UsageError(f"--template {file}: no such file.")
        return ChatTemplate(read_text(file), file.name)
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several by name, of which one is for plain conversations
        own = own.get("default")
    if not own:
        raise UsageError(
            "This model has no chat template, so --corpus chat can't ask it anything; give one by --template FILE "
            "(Jinja), or another --corpus."
        )
    return ChatTemplate(str(own), None)


def thinking_tokens(prompt: str, texts: Sequence[str], markers: Markers | None) -> int:
    """Return how many tokens of an answer are thinking, the marker that ends it among them.

    Args:
        prompt: The text before the answer, which may begin to think itself.
        texts: The text of each token of the answer.
        markers: Those of the template; None for none.

    >>> thinking_tokens("", ["<think>", "hm", "</think>", "yes"], Markers("<think>", "</think>"))
    3
    >>> thinking_tokens("<think>", ["hm"], Markers("<think>", "</think>"))
    1
    """
    if markers is None:
        return 0
    answer = "".join(texts)
    starts = prompt.rstrip().endswith(markers.begin) or answer.lstrip().startswith(markers.begin)
    if not starts:
        return 0
    at = answer.find(markers.end)
    if at < 0:
        return len(texts)
    end, length = at + len(markers.end), 0
    for count, text in enumerate(texts, 1):
        length += len(text)
        if length >= end:
            return count
    return len(texts)
