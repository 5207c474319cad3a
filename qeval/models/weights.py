"""A checkpoint's safetensors files, as they lie on disk: which they are, whether they are whole, what they hash to.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header that maps
each tensor's name to dtype, shape and byte range, then the bytes.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qeval.errors import UsageError
from qeval.identity import digest_file
from qeval.models.hashes import remembered

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LONGEST_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 20
_NAMED_AT_MOST = 4


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its safetensors dtype, its shape, and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`.

    Raises:
        UsageError: there are none (pickles are named as refused), or the index lists a file that is missing.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed_files(index)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UsageError(pickle_refused(str(folder), pickles))
    raise UsageError(f"'{folder}' has no weights: neither {SINGLE} nor {INDEX} is in it.")


def pickle_refused(where: str, pickles: Sequence[str]) -> str:
    """Why weights that exist as pickles alone are not read, and what to do."""
    return (
        f"'{where}' has its weights as pickles only ({pickles[0]}), which can run any code when they are read; "
        "take a revision that has safetensors (on the hub often refs/pr/1, a converter's pull request), or convert "
        "them with save_pretrained in an environment that you trust."
    )


def split_refused(where: str, name: str, count: int) -> str:
    """Why a GGUF model in several files, one of which is `name`, is not read, and what to do."""
    return (
        f"{where} is one of the {count} files that a model is split into, and the gguf package reads whole ones: get "
        f"them all, join them with llama.cpp's `llama-gguf-split --merge {name} whole.gguf`, which takes the first's "
        "name, and give whole.gguf."
    )


def check_complete(missing: Iterable[str], where: str) -> None:
    """Refuse a checkpoint that lacks tensors: transformers would fill them with random numbers, and go on.

    Raises:
        UsageError: it names them.
    """
    names = sorted(missing)
    if names:
        raise UsageError(f"'{where}' lacks tensors that its model needs: {listed(names)}.")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def read_entries(paths: Sequence[Path]) -> list[TensorEntry]:
    """The tensors of some files, sorted by name.

    Raises:
        UsageError: a file is torn or not safetensors, or two files hold a tensor of one name.
    """
    entries = sorted((entry for path in paths for entry in _file_entries(path)), key=lambda entry: entry.name)
    for first, second in pairwise(entries):
        if first.name == second.name:
            raise UsageError(f"'{first.path}' and '{second.path}' both hold the tensor {first.name}.")
    return entries


def weights_sha256(entries: Sequence[TensorEntry]) -> str:
    """The sha256 over (name, dtype, shape, bytes) of the tensors in the order of their names, in hex.

    How the tensors are spread over files does not matter. It is remembered by the files' path, size and time.
    """
    files = sorted({entry.path for entry in entries})
    return remembered("weights", files, lambda: _hash(entries))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, remembered by its path, size and time."""
    return remembered("file", [path], lambda: digest_file(path))


def main_dtype(entries: Sequence[TensorEntry]) -> str:
    """The float dtype that most parameters have, by torch's name.

    Raises:
        UsageError: no tensor is of a float dtype.
    """
    counts: Counter[str] = Counter()
    for entry in entries:
        if entry.dtype in _DTYPES:
            counts[_DTYPES[entry.dtype]] += math.prod(entry.shape)
    if not counts:
        held = ", ".join(sorted({entry.dtype for entry in entries})) or "nothing"
        raise UsageError(f"The checkpoint has no weights in fp64, fp32, fp16 or bf16, but {held}.")
    return counts.most_common(1)[0][0]


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"'{index}' is not an index of safetensors files; download it again.") from error
    folder = index.parent
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"'{folder}' is incomplete: {INDEX} lists {name}, which is missing; download it again.")
    return [folder / name for name in names]


def _file_entries(path: Path) -> list[TensorEntry]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return [_entry(path, name, value, 8 + length, size) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{path}' is torn or not safetensors ({error}); download it again.") from error


def _entry(path: Path, name: str, value: dict[str, Any], base: int, size: int) -> TensorEntry:
    start, end = (base + offset for offset in value["data_offsets"])
    if not base <= start <= end <= size:
        raise ValueError(f"the bytes of {name} end outside the file")
    return TensorEntry(name, value["dtype"], tuple(value["shape"]), path, start, end)


def _hash(entries: Sequence[TensorEntry]) -> str:
    sha = hashlib.sha256()
    for entry in entries:
        sha.update(json.dumps([entry.name, entry.dtype, list(entry.shape)]).encode() + b"\0")
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise UsageError(f"'{entry.path}' became shorter while it was read.")
                sha.update(chunk)
                left -= len(chunk)
    return sha.hexdigest()
