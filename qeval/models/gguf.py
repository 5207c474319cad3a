"""GGUF files become checkpoint folders, once: dequantized, with their tokenizer, in the cache, named by content."""

from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import Keys
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.cache import build_once
from qeval.models.gguf_reader import open_gguf
from qeval.models.quiet import quiet
from qeval.models.weights import check_complete, file_sha256, split_refused

CONVERSION_VERSION = 1
"""Raise it when the same file converts to other weights."""

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
            return f"The weights come from the GGUF file {file} ({listed} of the parameters)."
        return (
            f"The weights come from the quantized GGUF file {file} ({listed} of the parameters), dequantized: "
            "the baseline is that file, not the original model, and grids that match its own look better than they are."
        )


def read_contents(path: Path) -> Contents:
    """The quantization types of a GGUF file's matrices, the commonest first.

    Raises:
        UsageError: the file is torn, not GGUF, or one of those that a model is split into.
    """
    reader = open_gguf(path)
    split = reader.get_field(Keys.Split.LLM_KV_SPLIT_COUNT)
    if split is not None and (files := int(split.contents())) > 1:
        raise UsageError(split_refused(f"'{path}'", path.name, files))
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
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
    notes = [contents.sentence(path.name)]
    return convert(path, file_sha256(path), "gguf", notes=notes, dtype=contents.dtype)


def convert(path: Path, sha256: str, prefix: str, *, notes: Sequence[str], dtype: torch.dtype) -> Path:
    """The folder `prefix-…` of the file whose content is `sha256`, made unless it is in the cache."""
    return build_once(folder_name(prefix, sha256), notes, lambda folder: _make(path, folder, dtype))


def folder_name(prefix: str, sha256: str) -> str:
    """How the cache calls the folder of a file with this content."""
    key = digest({"gguf_sha256": sha256, "conversion": CONVERSION_VERSION})
    return f"{prefix}-{key[:16]}"


def _make(path: Path, folder: Path, dtype: torch.dtype) -> None:
    # transformers prefers a tokenizer that lies beside the file to the file's own, and the cache goes by the file
    with TemporaryDirectory(prefix="qeval-gguf-") as alone:
        link = Path(alone) / path.name
        link.symlink_to(path.resolve())
        _convert_alone(link, path, folder, dtype)


def _convert_alone(link: Path, path: Path, folder: Path, dtype: torch.dtype) -> None:
    where: dict[str, Any] = {"gguf_file": link.name, "local_files_only": True, "trust_remote_code": False}
    # The progress bars of a conversion do not ask transformers' own switch; nothing else is written there.
    with quiet(), redirect_stderr(StringIO()):
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                link.parent,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                output_loading_info=True,
                **where,
            )
            tokenizer = AutoTokenizer.from_pretrained(link.parent, **where)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UsageError(f"'{path}' can't be converted: {str(error).rstrip('.')}.") from error
        check_complete(report["missing_keys"], str(path))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
