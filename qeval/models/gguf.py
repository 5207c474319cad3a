"""GGUF files become checkpoint folders, once: dequantized, with their tokenizer, in the cache, named by content.

A folder appears whole or not at all. Its `qeval.json` says which file it was made from and what a reader of results
must know about it: weights that come from a quantized file already lie on that file's grid.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from huggingface_hub.utils import WeakFileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qeval import paths
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.identity import digest
from qeval.models.quiet import quiet
from qeval.models.weights import file_sha256

CONVERSION_VERSION = 1
"""Raise it when the same file converts to other weights."""

_RECORD = "qeval.json"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Contents:
    """How many parameters of which GGUF type the matrices of a file are (norms are always float)."""

    types: tuple[tuple[str, int], ...]

    @property
    def quantized(self) -> bool:
        """Whether any matrix is of a type other than a float."""
        return any(name not in ("F32", "F16", "BF16", "F64") for name, _ in self.types)

    @property
    def dtype(self) -> torch.dtype:
        """What the matrices are saved as: their own float type where they share one, else float16."""
        return _FLOATS.get(self.types[0][0], torch.float16) if len(self.types) == 1 else torch.float16

    def sentence(self, file: str) -> str:
        """What a reader must know about weights that come from this file."""
        total = sum(count for _, count in self.types)
        listed = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in self.types)
        if not self.quantized:
            return f"The weights come from the GGUF file {file} ({listed} of the matrices' parameters)."
        return (
            f"The weights come from the quantized GGUF file {file} ({listed} of the matrices' parameters), dequantized: "
            "the baseline is that file, not the original model, and grids that match its own look better than they are."
        )


def read_contents(path: Path) -> Contents:
    """The quantization types of a GGUF file's matrices, the commonest first.

    Raises:
        UsageError: the file is torn or not GGUF.
    """
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is torn or not a GGUF file ({error}).") from error
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    if not counts:
        raise UsageError(f"'{path}' holds no weight matrices.")
    return Contents(tuple(counts.most_common()))


def converted(path: Path) -> Path:
    """The checkpoint folder that a GGUF file converts to, made when it isn't in the cache yet.

    Raises:
        UsageError: the file is no GGUF, or its architecture can't be converted.
        QevalError: the cache can't be written.
    """
    contents = read_contents(path)
    return convert(path, file_sha256(path), "gguf", [contents.sentence(path.name)], contents.dtype)


def converted_folder(sha256: str, prefix: str) -> Path:
    """Where the file of that sha256 lies, or would lie, converted."""
    key = digest({"gguf_sha256": sha256, "conversion": CONVERSION_VERSION})
    return paths.home() / "models" / f"{prefix}-{key[:16]}"


def convert(path: Path, sha256: str, prefix: str, notes: Sequence[str], dtype: torch.dtype) -> Path:
    """Convert `path` into the cache unless it is there; `notes` are kept with it. One process at a time."""
    folder = converted_folder(sha256, prefix)
    if not folder.is_dir():
        try:
            with locked_models() as root:
                if not folder.is_dir():
                    _make(path, sha256, folder, root / f"{_TEMPORARY}{folder.name}", notes, dtype)
        except OSError as error:
            raise QevalError(f"Cannot write {folder}: {error.strerror or error}.") from error
    read_notes(folder)
    return folder
