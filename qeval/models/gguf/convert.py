"""GGUF files become checkpoint folders, once: dequantized, with their tokenizer, in the cache, named by content."""

from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, Keys, ReaderTensor
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.checkpoint.cache import build_once
from qeval.models.checkpoint.weights import file_sha256, split_refusal
from qeval.models.gguf.reader import gguf_errors, open_gguf
from qeval.models.gguf.rope import TENSORS
from qeval.models.gguf.settings import GgufSettings, Metadata, gguf_settings, metadata_of
from qeval.models.gguf.tensors import state_of
from qeval.models.gguf.tokens import tokenizer_of, vocabulary_notes
from qeval.models.silence_transformers import quiet, transformers_errors
from qeval.models.vocabulary import NO_TOKENIZER

CONVERSION_VERSION = 2
"""Raise it when the same file converts to other weights."""

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Contents:
    """The numbers of parameters of each GGUF type that a file's matrices hold (norms are always float)."""

    types: tuple[tuple[str, int], ...]

    @property
    def quantized(self) -> bool:
        """Return whether any matrix is of a type other than a float."""
        return any(name not in ("F32", "F16", "BF16", "F64") for name, _ in self.types)

    @property
    def dtype(self) -> torch.dtype:
        """The type that matrices are saved as: their own float type where they share one, else float16."""
        return _FLOATS.get(self.types[0][0], torch.float16) if len(self.types) == 1 else torch.float16

    def sentence(self, file: str) -> str:
        """Return what a reader must know about weights that come from this file."""
        total = sum(count for _, count in self.types)
        listed = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in self.types)
        if not self.quantized:
            return f"The weights come from the GGUF file {file} ({listed} of the parameters)."
        return (
            f"The weights come from the quantized GGUF file {file} ({listed} of the parameters), dequantized: "
            "the baseline is that file, not the original model, and grids that match its own look better than they are."
        )


def read_contents(path: Path) -> Contents:
    """Return the quantization types of a GGUF file's matrices, the commonest first.

    Raises:
        UsageError: The file is torn, not GGUF, or one of those that a model is split into.
    """
    with gguf_errors(path):
        return _contents(open_gguf(path), path)


def _contents(reader: GGUFReader, path: Path) -> Contents:
    split = reader.get_field(Keys.Split.LLM_KV_SPLIT_COUNT)
    if split is not None and (files := int(split.contents())) > 1:
        raise UsageError(split_refusal(f"'{path}'", path.name, files))
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    if not counts:
        raise UsageError(f"'{path}' holds no weight matrices.")
    return Contents(tuple(counts.most_common()))


def convert_gguf(path: Path) -> Path:
    """Return the checkpoint folder that a GGUF file converts to, made where it isn't in the cache yet.

    Raises:
        UsageError: The file is no GGUF, or its architecture can't be converted.
        QevalError: The cache can't be written.
    """
    contents = read_contents(path)
    with gguf_errors(path):
        notes = [contents.sentence(path.name), *vocabulary_notes(open_gguf(path))]
    return build_checkpoint(path, file_sha256(path), "gguf", notes=notes, dtype=contents.dtype)


def build_checkpoint(path: Path, sha256: str, prefix: str, *, notes: Sequence[str], dtype: torch.dtype) -> Path:
    """Return the folder `prefix-…` of the file whose content is `sha256`, made unless it is in the cache.

    Args:
        path: The file.
        sha256: The hash of its content.
        prefix: What the folder's name begins with.
        notes: Sentences that are kept with the folder.
        dtype: What matrices are kept in.
    """
    return build_once(folder_name(prefix, sha256), notes, lambda folder: _make(path, folder, dtype))


def folder_name(prefix: str, sha256: str) -> str:
    """Return what the cache calls the folder of a file with this content."""
    key = digest({"gguf_sha256": sha256, "conversion": CONVERSION_VERSION})
    return f"{prefix}-{key[:16]}"


def settings_in(path: Path) -> GgufSettings:
    """Return the configuration that a GGUF file's metadata means, and what of it the file states.

    Raises:
        UsageError: As `gguf_settings`.
    """
    with gguf_errors(path):
        return _read(open_gguf(path), path)[1]


def _make(path: Path, folder: Path, dtype: torch.dtype) -> None:
    # transformers prefers a tokenizer that lies beside the file to the file's own, and the cache goes by the file
    with TemporaryDirectory(prefix="qeval-gguf-") as alone:
        link = Path(alone) / path.name
        link.symlink_to(path.resolve())
        _convert(link, path, folder, dtype)


def _convert(link: Path, path: Path, folder: Path, dtype: torch.dtype) -> None:
    with gguf_errors(path):
        reader = open_gguf(path)
        metadata, settings = _read(reader, path)

    tokenizer = None
    try:
        with gguf_errors(path):
            tokenizer = tokenizer_of(reader, link, path)
    except UsageError as error:  # a variant is asked the baseline's token ids; a baseline needs its own
        (folder / NO_TOKENIZER).write_text(str(error), encoding="utf-8")

    with transformers_errors(f"'{path}' can't be converted"):
        config = AutoConfig.for_model(**settings.values, dtype=dtype, pad_token_id=None, **_ids(tokenizer))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with gguf_errors(path):
        model.load_state_dict(state_of(reader, metadata, model, dtype), strict=False, assign=True)
        model.tie_weights()
    with quiet(), redirect_stderr(StringIO()):  # the progress bars of saving do not ask transformers' own switch
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _read(reader: GGUFReader, path: Path) -> tuple[Metadata, GgufSettings]:
    metadata = metadata_of(reader, path)
    factors = {tensor.name: _factors(tensor) for tensor in reader.tensors if tensor.name in TENSORS}
    return metadata, gguf_settings(metadata, factors)


def _factors(tensor: ReaderTensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(-1)
    return values


def _ids(tokenizer: Any) -> dict[str, int | None]:
    """Return the special tokens' ids, as a configuration names them."""
    return {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
