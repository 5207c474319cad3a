"""A checkpoint's tokenizer: that it is whole, and which of its ids the model has no row for."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qeval.errors import UsageError
from qeval.escape import cut
from qeval.models.silence_transformers import transformers_errors

NO_TOKENIZER = "no_tokenizer.txt"
"""Why a converted folder has no tokenizer, in a sentence."""
_PROBE = "The quick brown fox, it's 12 o'clock."
_WHOLE = ("tokenizer.json", "tekken.json")
"""Files that are a tokenizer by themselves."""
_VOCABULARIES = ("tokenizer.model*", "*.model", "*.tiktoken", "vocab.txt", "vocab.json", "*vocab*.json")
_NAMED_AT_MOST = 3


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder.

    Raises:
        UsageError: There is none, a file that it needs is missing, or it can't be read.
    """
    if (folder / NO_TOKENIZER).is_file():
        raise UsageError((folder / NO_TOKENIZER).read_text(encoding="utf-8"))
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise UsageError(f"'{folder}' has no tokenizer: neither tokenizer.json nor tokenizer.model is in it.")
    _check_files(folder)
    with transformers_errors(f"The tokenizer in '{folder}' can't be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"its model_max_length is {cut(tokenizer.model_max_length)}, which is no number")
        _check_tokenizes(tokenizer)
        return tokenizer


def _check_tokenizes(tokenizer: Any) -> None:
    """Have a tokenizer make and spell ids, so that what fails there is found at the door, with the file's name."""
    ids = tokenizer(_PROBE, add_special_tokens=True, verbose=False)["input_ids"]
    tokenizer.decode(ids)
    len(tokenizer.get_vocab())


def check_vocabulary(tokenizer: Any, rows: int, folder: Path | str) -> list[str]:
    """Return sentences on ids that the model has no embedding for; a text that uses one is refused later.

    Args:
        tokenizer: The model's.
        rows: How many rows the embedding has.
        folder: Where both lie.

    Raises:
        UsageError: The vocabulary is empty, or knows next to nothing of plain English.
    """
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise UsageError(f"The tokenizer in '{folder}' has an empty vocabulary.")
    _check_probe(tokenizer, rows, folder)
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if not beyond:
        return []
    named = ", ".join(f"{token} ({index})" for index, token in beyond[:_NAMED_AT_MOST])
    more = f" and {len(beyond) - _NAMED_AT_MOST} more" if len(beyond) > _NAMED_AT_MOST else ""
    return [
        f"The tokenizer has tokens beyond the embedding's {rows} rows: {named}{more}. A text that holds one is refused."
    ]


def check_ids(ids: Iterable[int], rows: int, tokenizer: Any, what: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        ids: Those of a text.
        rows: How many rows the embedding has.
        tokenizer: What made the ids.
        what: What the text is called.

    Raises:
        UsageError: It names the first such token.
    """
    if (largest := max(ids, default=-1)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UsageError(
            f"{what} holds the token {token} (id {largest}), but the model's embedding has {rows} rows: the tokenizer "
            "belongs to another model, or the token to a part of it that is not loaded; take it out of the text."
        )


def _check_files(folder: Path) -> None:
    """Refuse a folder whose tokenizer lacks its vocabulary or merges: transformers makes one up."""
    if any((folder / name).is_file() for name in _WHOLE):
        return
    if not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
        raise UsageError(
            f"The tokenizer in '{folder}' is incomplete: there is neither tokenizer.json nor a vocabulary "
            "(tokenizer.model, vocab.json) in it; download it again."
        )
    models = [path for pattern in ("*.model", "*.tiktoken", "tokenizer.model*") for path in folder.glob(pattern)]
    if (folder / "vocab.json").is_file() and not (folder / "merges.txt").is_file() and not models:
        raise UsageError(f"The tokenizer in '{folder}' is incomplete: vocab.json lies there without merges.txt.")


def _check_probe(tokenizer: Any, rows: int, folder: Path | str) -> None:
    """Refuse a tokenizer that makes nothing, or unknown tokens, of plain English."""
    ids = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = sum(index == tokenizer.unk_token_id for index in ids)
    if not ids or 2 * unknown > len(ids):
        raise UsageError(
            f"The tokenizer in '{folder}' knows no plain English: of {_PROBE!r} it makes {len(ids)} tokens, {unknown} "
            "of them unknown. Its vocabulary is missing or another's."
        )
    check_ids(ids, rows, tokenizer, f"The tokenizer in '{folder}' is another model's: {_PROBE!r}")


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a text: the tokenizer's EOS, and those that the checkpoint generates until."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return frozenset(int(each) for each in found if each is not None)
