"""Grammars of function calls as sets of tokens, by llguidance (an extra).

A grammar is a JSON Schema's texts: white space may stand wherever JSON has it, and properties come in the schema's
order. Every way to spell a text in tokens is allowed, not the tokenizer's own alone. Any text may follow the call.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qeval.errors import UsageError, first_line
from qeval.types import TokenIds

_LARK = r"""%llguidance {{"no_forcing": true}}
start: SPACE call REST
call: %json {schema}
SPACE: /[ \t\r\n]*/
REST: /(?s:.*)/
"""
"""`no_forcing` lets tokens through that spell a forced text otherwise than the tokenizer would."""


class GrammarPath(NamedTuple):
    """The allowed tokens along a text, packed eight a byte for each of its tokens, and whether the text is complete."""

    masks: bytes
    is_complete: bool


@dataclass(frozen=True, eq=False)
class GrammarVocabulary:
    """A tokenizer as llguidance has it, and the width of the model's logits."""

    tokens: Any
    size: int

    @classmethod
    def of(cls, tokenizer: Any, width: int) -> "GrammarVocabulary":
        """Return the vocabulary of a tokenizer.

        Args:
            tokenizer: The model's, of the Rust library.
            width: The width of the model's logits.

        Raises:
            UsageError: The package is not installed, or the tokenizer is of another kind or has no EOS token.
        """
        _llguidance()
        from llguidance.hf import from_tokenizer  # noqa: PLC0415 - an extra

        if tokenizer.eos_token_id is None:
            raise UsageError("This tokenizer has no EOS token, and --tasks grammar ends a call with it.")
        try:
            tokens = from_tokenizer(tokenizer, n_vocab=max(width, len(tokenizer)))
        except ValueError as error:
            raise UsageError(f"--tasks grammar can't read this model's tokenizer: {first_line(error)}.") from error
        return cls(tokens, tokens.vocab_size)


@dataclass(frozen=True, eq=False)
class CallGrammar:
    """The grammar of a call: llguidance's Lark text over a vocabulary."""

    text: str
    vocabulary: GrammarVocabulary

    def matcher(self) -> "GrammarMatcher":
        """Return the grammar with nothing matched yet."""
        return GrammarMatcher(self)

    def path(self, tokens: TokenIds) -> GrammarPath:
        """Return the tokens that are allowed at each token of a text; it ends where the text is complete.

        Raises:
            ValueError: A token is not allowed.
        """
        matcher, masks = self.matcher(), []
        for token in tokens:
            masks.append(matcher.packed())
            matcher.take(token)
        return GrammarPath(b"".join(masks), matcher.is_complete)


class GrammarMatcher:
    """A grammar and how far a text has come in it; a `backends.decoding.Matcher`."""

    def __init__(self, grammar: CallGrammar) -> None:
        """Start with an empty text."""
        self._size = grammar.vocabulary.size
        self._matcher = _llguidance().LLMatcher(grammar.vocabulary.tokens, grammar.text, log_level=0)

    @property
    def is_complete(self) -> bool:
        """Return whether the call is closed."""
        return bool(self._matcher.is_accepting())

    def packed(self) -> bytes:
        """Return the tokens that may follow, eight a byte, the first in the lowest bit."""
        return bytes(self._matcher.compute_bitmask())

    def allowed(self) -> Tensor:
        """Return which tokens may follow, bool [tokens]."""
        bits = np.unpackbits(np.frombuffer(self.packed(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._size].astype(np.bool_))

    def take(self, token: int) -> None:
        """Put a token behind the text.

        Raises:
            ValueError: The grammar does not allow it.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"The grammar does not allow token {token} there.")


def call_grammar(schemas: Sequence[Mapping[str, Any]], vocabulary: GrammarVocabulary, where: str) -> CallGrammar:
    """Return the grammar of one JSON object that meets one of several schemas.

    Args:
        schemas: JSON Schemas of calls.
        vocabulary: The model's.
        where: What an error calls the prompt.

    Raises:
        UsageError: A schema is none, or says what llguidance does not know.
    """
    matcher = _llguidance().LLMatcher
    text = matcher.grammar_from_lark(_LARK.format(schema=json.dumps({"anyOf": list(schemas)})))
    is_wrong, messages = matcher.validate_grammar_with_warnings(text, vocabulary.tokens)
    if is_wrong:
        line = messages[0].splitlines()[0]
        reason = line.partition("JSON schema: ")[2] or line
        raise UsageError(f"{where}: the parameters of its tools are no JSON Schema that llguidance takes: {reason}.")
    return CallGrammar(text, vocabulary)


def grammar_engine() -> str:
    """Return the name and version of what makes masks.

    Raises:
        UsageError: It is not installed.
    """
    _llguidance()
    return f"llguidance {version('llguidance')}"


def _llguidance() -> Any:
    try:
        import llguidance  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError("--tasks grammar takes llguidance; pip install 'qeval[grammar]'.") from error
    return llguidance
