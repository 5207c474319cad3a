"""Tokens as texts, for endpoints that know no ids: an id's text, and the id of a text where only one has it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from qeval.errors import UsageError

TOKEN_ID = "token_id:"
"""The form in which vLLM writes a token where it was asked for ids in the place of texts."""


class TokenTexts:
    """The texts of a tokenizer's ids."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        """`size` is the number of ids that the model has logits of."""
        self._tokenizer, self.size = tokenizer, size

    def as_text(self, flag: str, tokens: Sequence[int]) -> str:
        """Return a text that the tokenizer makes these very tokens of.

        Raises:
            UsageError: There is none: a character is cut in two, say. `flag` opens it.
        """
        text = self._decode(tokens)
        if self._tokenizer.encode(text, add_special_tokens=False) != list(tokens):
            raise UsageError(
                f"{flag} takes no token ids, and as a text these {len(tokens)} tokens would be others; serve the model "
                "by an engine that takes ids (vLLM, SGLang, llama-server)."
            )
        return text

    def by_id(self, entries: Mapping[str, float], count: int) -> dict[int, float]:
        """Return log-probabilities by id; a text that is no token's alone (parts of characters) has one below zero.

        Args:
            entries: The likeliest tokens' log-probabilities by text.
            count: How many were asked for. Where fewer texts are there, one stood for several tokens and shows the last
                of them; the first may be the likeliest of all, so 0 is what such a text has at most.
        """
        ids = [self._id(text) for text in entries]
        found = {token: float(value) for token, value in zip(ids, entries.values(), strict=True) if token is not None}
        if unknown := [float(value) for token, value in zip(ids, entries.values(), strict=True) if token is None]:
            found[-1] = 0.0 if len(entries) < count else max(unknown)
        return found

    def check(self, flag: str, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Refuse texts that are not those of the tokens that were sent.

        Raises:
            UsageError: It names the first place where they differ; `flag` opens it.
        """
        for place, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            own = self._decode([token])
            is_part = "\ufffd" in text and "\ufffd" in own  # bytes that are part of a character have no text
            if not is_part and text not in (f"{TOKEN_ID}{token}", own, *self._spellings(token)):
                raise UsageError(
                    f"{flag} read other tokens than it was sent: at place {place} '{text}' for '{own}'. Its model has "
                    "another tokenizer than the baseline, or it adds tokens."
                )

    def _id(self, text: str) -> int | None:
        if text.startswith(TOKEN_ID):
            return int(text.removeprefix(TOKEN_ID))
        return self._ids.get(text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def _spellings(self, token: int) -> tuple[str, str]:
        """Return a token as the vocabulary writes it, and with a space for the mark that stands for one."""
        written: str = self._tokenizer.convert_ids_to_tokens(token) or ""
        return written, written.replace("\u2581", " ").replace("\u0120", " ")

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The ids of texts that one token alone has."""
        known = range(min(self.size, len(self._tokenizer)))
        texts = self._tokenizer.batch_decode([[token] for token in known], skip_special_tokens=False)
        ids: dict[str, int] = {}
        doubled: set[str] = set()
        for token, text in zip(known, texts, strict=True):
            doubled |= {text} if text in ids else set()
            ids[text] = token
        return {text: token for text, token in ids.items() if text not in doubled}
