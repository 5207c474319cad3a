"""A byte-level vocabulary into a GGUF file: tokens, merges, special ids, chat template, and its pre-tokenizer's name.

The other half of `models/gguf/tokens.py`, which reads them. llama.cpp knows how text is cut before the merges by a name
alone, so a tokenizer whose expressions have none there is not written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf

from qeval.errors import UsageError
from qeval.models.gguf.reader import open_gguf
from qeval.models.gguf.tokens import PRE_TOKENIZERS, takes_whole_tokens, tokenizer_of

_GPT2 = PRE_TOKENIZERS["gpt-2"]
_UNNAMED = "llama.cpp has no name for what its tokenizer cuts text by"
_SPECIAL = ("bos", "eos", "unk", "pad")


class Vocabulary:
    """A tokenizer's vocabulary as GGUF has it."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        """Take a tokenizer apart; `rows` of the embedding are named.

        Raises:
            UsageError: llama.cpp has no such vocabulary; it says what of it.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        settings: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
        model = settings.get("model") or {}
        if model.get("type") != "BPE" or model.get("byte_fallback") or settings.get("normalizer"):
            raise UsageError("its vocabulary is not byte-level BPE")
        self._tokenizer = tokenizer
        self.pre = _pre_tokenizer(settings.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        """llama.cpp's name for what cuts text."""
        self._tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        self._rows = max(rows, len(self._tokens))
        self._merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        self._added = {int(index): token.special for index, token in tokenizer.added_tokens_decoder.items()}

    def add_to(self, writer: Any) -> None:
        """Write the vocabulary's keys."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([self._tokens.get(index, f"[PAD{index}]") for index in range(self._rows)])
        writer.add_token_types([self._kind(index) for index in range(self._rows)])
        writer.add_token_merges(self._merges)
        for name in _SPECIAL:
            if (index := getattr(self._tokenizer, f"{name}_token_id")) is not None:
                getattr(writer, f"add_{name}_token_id")(index)
        around = self._tokenizer("a").input_ids
        writer.add_add_bos_token(around[0] == self._tokenizer.bos_token_id)
        writer.add_add_eos_token(around[-1] == self._tokenizer.eos_token_id)
        if isinstance(self._tokenizer.chat_template, str):
            writer.add_chat_template(self._tokenizer.chat_template)

    def read_back(self) -> Any:
        """Return the tokenizer that qeval reads of a file with this vocabulary.

        Raises:
            UsageError: It reads none.
        """
        with TemporaryDirectory(prefix="qeval-vocabulary-") as folder:
            path = Path(folder) / "vocabulary.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            self.add_to(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            return tokenizer_of(open_gguf(path), path, path)

    def _kind(self, index: int) -> gguf.TokenType:
        if index not in self._tokens:
            return gguf.TokenType.UNUSED
        if index not in self._added:
            return gguf.TokenType.NORMAL
        return gguf.TokenType.CONTROL if self._added[index] else gguf.TokenType.USER_DEFINED


def _pre_tokenizer(settings: Mapping[str, Any] | None, ignores_merges: bool) -> str:
    """Return llama.cpp's name for what cuts text before the merges.

    Raises:
        UsageError: It has none.
    """
    steps = (settings or {}).get("pretokenizers", [settings or {}])
    splits = tuple(split for step in steps for split in _splits(step))
    if steps[-1].get("type") != "ByteLevel":
        raise UsageError("its vocabulary is not byte-level BPE")
    for name, known in PRE_TOKENIZERS.items():
        if known == splits and takes_whole_tokens(name) == ignores_merges:
            return name
    raise UsageError(_UNNAMED)


def _splits(step: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the expressions that a step of a pre-tokenizer cuts by.

    Raises:
        UsageError: It does something else.
    """
    match step:
        case {"type": "Split", "pattern": {"Regex": str(split)}, "behavior": "Isolated", "invert": False}:
            return (split,)
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
            return _GPT2 if uses else ()
    raise UsageError(_UNNAMED)
