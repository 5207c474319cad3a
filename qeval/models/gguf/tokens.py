r"""A GGUF file's vocabulary as a tokenizer: its own tokens and no others, cut as its pre-tokenizer says.

Byte-level vocabularies (`gpt2`) are built here from tokens, merges and the regular expressions of the file's
pre-tokenizer; SentencePiece ones (`llama`) by transformers, with the file's own rule for the first space. What
llama.cpp names a pre-tokenizer is in its src/llama-vocab.cpp; the expressions are those of the models' own
tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qeval.errors import UsageError, first_line
from qeval.models.silence_transformers import quiet

_CONTROL, _USER_DEFINED = 3, 4
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_WORDS}|\p{{N}}|{_REST}",)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CASED_END = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (rf"{_CASED}{_CONTRACTED}?|{_CASED_END}{_CONTRACTED}?|\p{{N}}{{1,3}}|{_SLASHED}",)
_DIGITS = (r"\p{N}", _GPT2)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_NAMES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (_LLAMA3, ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "smaug-bpe")),
    (_LLAMA3, ("dbrx", "glm4", "chatglm-bpe")),
    (_QWEN2, ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "solar-open")),
    (_GPT4O, ("gpt-4o", "llama4", "kanana2", "minimax-m2")),
    ((rf"{_CASED}|{_CASED_END}|\p{{N}}|{_SLASHED}",), ("tekken",)),
    ((_GPT2,), ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "default")),
    (_DIGITS, ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")),
    (_DEEPSEEK3, ("deepseek-v3", "hunyuan-dense")),
    (
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
        ("deepseek-coder",),
    ),
    ((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"), ("falcon",)),
)
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {name: splits for splits, names in _NAMES for name in names}
"""The regular expressions that text is cut by, one after the other, by the name of a pre-tokenizer."""
_WHOLE_TOKENS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Pre-tokenizers of vocabularies in which a word that is a token is taken whole, whatever its merges. They put BOS in
front where the file does not say otherwise."""
_USED = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)
_KNOWN = (
    "chat_template",
    "chat_templates",
    "huggingface.json",
    "ggml.token_type_count",
    "ggml.add_sep_token",
    "rwkv.world",
)
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_TYPES = ("gpt2", "llama")


def takes_whole_tokens(pre: str) -> bool:
    """Return whether a word that is a token is taken whole under a pre-tokenizer, whatever its merges."""
    return pre in _WHOLE_TOKENS


def tokenizer_of(reader: GGUFReader, alone: Path, where: Path) -> Any:
    """Return the tokenizer that a file describes, or None where it says that it holds none.

    Args:
        reader: The open file.
        alone: The file in a folder of its own, for transformers.
        where: What messages call the file.

    Raises:
        UsageError: Its vocabulary, pre-tokenizer or a key of it is not read.
    """
    keys = {n.removeprefix("tokenizer."): f for n, f in reader.fields.items() if n.startswith("tokenizer.")}
    said = {name: field.contents() for name, field in keys.items() if name not in _KNOWN}
    settings = {name.removeprefix("ggml."): value for name, value in said.items()}
    kind = str(settings.get("model", "none"))
    if kind in ("none", "no_vocab"):
        return None
    if kind not in _TYPES:
        raise UsageError(
            f"'{where}' has a vocabulary of the type '{kind}', which is not read; these are: {', '.join(_TYPES)}."
        )
    _check_known(said, where)
    backend = _byte_level(settings, where) if kind == "gpt2" else _sentencepiece(settings, alone, where)
    return _wrap_tokenizer(backend, settings, keys.get("chat_template"))


def vocabulary_notes(reader: GGUFReader) -> list[str]:
    """Return what a reader must know of a file's vocabulary."""
    model, pre = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model is None or model.contents() != "gpt2" or (pre is not None and pre.contents() != "default"):
        return []
    return ["The file does not say how text is cut before its vocabulary is applied: GPT-2's rule is taken."]


def _check_known(said: Mapping[str, Any], where: Path) -> None:
    """Refuse keys that may change which tokens a text has."""
    for name, value in said.items():
        leaf = name.removeprefix("ggml.")
        if leaf in _USED or leaf.endswith(("_token_id", "_token_ids")) or name.startswith("chat_template"):
            continue
        if value:
            raise UsageError(f"'{where}' has the key tokenizer.{name}, which is not read and may change its tokens.")


def _byte_level(said: Mapping[str, Any], where: Path) -> Tokenizer:
    pre = str(said.get("pre", "default"))
    if pre not in PRE_TOKENIZERS:
        raise UsageError(
            f"'{where}' cuts text by the pre-tokenizer '{pre}', which is not read; give the model's folder, or a file "
            f"of one of these: {', '.join(PRE_TOKENIZERS)}."
        )

    tokens: Sequence[str] = said["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in said.get("merges", ())]
    vocab = _vocabulary(tokens, where)
    try:
        backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_TOKENS))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"'{where}' has a vocabulary and merges that do not fit ({first_line(error)}).") from error

    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in PRE_TOKENIZERS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, said.get("token_type", ()))
    return backend


def _vocabulary(tokens: Sequence[str], where: Path) -> dict[str, int]:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise UsageError(f"'{where}' has a vocabulary in which {len(tokens) - len(vocab)} tokens stand twice.")
    return vocab


def _sentencepiece(said: Mapping[str, Any], alone: Path, where: Path) -> Tokenizer:
    """Return transformers' own of the file, where its ids are the file's; the first space as the file has it."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                alone.parent, gguf_file=alone.name, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"'{where}' has a vocabulary that can't be converted ({first_line(error)}).") from error
    backend: Tokenizer = tokenizer.backend_tokenizer
    tokens: Sequence[str] = said["tokens"]
    _check_ids(backend, tokens, where)
    prefix = [normalizers.Prepend("▁")] if said.get("add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return backend


def _check_ids(backend: Tokenizer, tokens: Sequence[str], where: Path) -> None:
    """Refuse a vocabulary that the converter extended or moved."""
    plain = [index for index, token in enumerate(tokens) if not (" " in token and not token.strip())]
    moved = [index for index in plain if backend.id_to_token(index) != tokens[index]]
    extra = backend.get_vocab_size() - len(tokens)
    if moved or extra > 0:
        raise UsageError(
            f"'{where}' has a vocabulary that transformers converts into another: {len(moved)} ids hold other tokens, "
            f"and {max(0, extra)} were added; give the model's folder."
        )


def _add_special(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Add tokens that are matched whole in a text: control tokens, and those that a user defined."""
    kinds = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])


def _wrap_tokenizer(backend: Tokenizer, said: Mapping[str, Any], template: Any) -> Any:
    tokens: Sequence[str] = said["tokens"]
    ids = {name: said.get(f"{key}_token_id") for name, key in _NAMED.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}

    # the tokens that are put before and behind a text
    usual = said["model"] == "llama" or str(said.get("pre")) in _WHOLE_TOKENS
    front = named.get("bos_token") if said.get("add_bos_token", usual) else None
    behind = named.get("eos_token") if said.get("add_eos_token", False) else None
    around = [token for token in (front, behind) if token]
    first, last = (f"{front} " if front else ""), (f" {behind}" if behind else "")

    processed: list[Any] = [] if said["model"] == "llama" else [processors.ByteLevel(trim_offsets=False)]
    if around:
        processed.append(
            processors.TemplateProcessing(
                single=f"{first}$A{last}",
                pair=f"{first}$A{last} {first}$B{last}".replace("  ", " "),
                special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(around)],
            )
        )
    backend.post_processor = processors.Sequence(processed) if processed else None

    with quiet():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    if template is not None:
        tokenizer.chat_template = template.contents()
    return tokenizer
