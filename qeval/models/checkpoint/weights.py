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
from pathlib import Path, PurePath
from typing import Any

from qeval.errors import UsageError
from qeval.files.hashes import cached_hash
from qeval.identity import digest_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The float types that weights are computed from as they are, by safetensors' names and torch's."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""How many bits a number of each of safetensors' types takes (safetensors/src/tensor.rs, `Dtype::bitsize`)."""
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
    """Return the safetensors files that make up the checkpoint in `folder`.

    Raises:
        UsageError: There are none (pickles and adapters are named as refused), the index lists a file that is missing,
            or one file and an index of others hold different weights.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        return _single_beside_index(single, index)
    if index.is_file():
        return _indexed_files(index)
    if single.is_file():
        return [single]
    if (folder / ADAPTER).is_file():
        raise UsageError(adapter_refusal(folder))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UsageError(pickle_refusal(str(folder), pickles))
    raise UsageError(f"'{folder}' has no weights: neither {SINGLE} nor {INDEX} is in it.")


def pickle_refusal(where: str, pickles: Sequence[str]) -> str:
    """Return why weights that exist as pickles alone are not read, and what to do."""
    return (
        f"'{where}' has its weights as pickles only ({pickles[0]}), which can run any code when they are read; "
        "take a revision that has safetensors (on the hub often refs/pr/1, a converter's pull request), or convert "
        "them with save_pretrained in an environment that you trust."
    )


def adapter_refusal(folder: Path) -> str:
    """Return why a folder with an adapter alone is no model, and what to do.

    Args:
        folder: It holds an `adapter_config.json`, as PEFT writes it.
    """
    try:
        about = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base = str(about["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        base = "a model that it does not name"
    return (
        f"'{folder}' holds a PEFT adapter for {base} and no model: merge the two first (load them with peft, then "
        "`merge_and_unload()` and `save_pretrained`), and give the folder of the result."
    )


def split_refusal(where: str, name: str, count: int) -> str:
    """Return why a GGUF model in several files, one of which is `name`, is not read, and what to do."""
    return (
        f"{where} is one of the {count} files that a model is split into, and the gguf package reads whole ones: get "
        f"them all, join them with llama.cpp's `llama-gguf-split --merge {name} whole.gguf`, which takes the first's "
        "name, and give whole.gguf."
    )


def check_complete(missing: Iterable[str], where: str) -> None:
    """Refuse a checkpoint that lacks tensors: transformers would fill them with random numbers, and go on.

    Raises:
        UsageError: It names them.
    """
    names = sorted(missing)
    if names:
        raise UsageError(f"'{where}' lacks tensors that its model needs: {shorten_list(names)}.")


def shorten_list(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def read_entries(paths: Sequence[Path]) -> list[TensorEntry]:
    """Return the tensors of some files, sorted by name.

    Raises:
        UsageError: A file is torn or not safetensors, or two files hold a tensor of one name.
    """
    entries = sorted((entry for path in paths for entry in _file_entries(path)), key=lambda entry: entry.name)
    for first, second in pairwise(entries):
        if first.name == second.name:
            raise UsageError(f"'{first.path}' and '{second.path}' both hold the tensor {first.name}.")
    return entries


def weights_sha256(entries: Sequence[TensorEntry]) -> str:
    """Return the sha256 over (name, dtype, shape, bytes) of the tensors in the order of their names, in hex.

    How the tensors are spread over files does not matter. It is remembered for files that have not changed.
    """
    files = sorted({entry.path for entry in entries})
    return cached_hash("weights", files, lambda: _hash(entries))


def hash_header(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """Return what stands before a tensor's bytes in the hash of a model's weights; `dtype` by safetensors' name."""
    return json.dumps([name, dtype, list(shape)]).encode() + b"\0"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, remembered while it has not changed."""
    return cached_hash("file", [path], lambda: digest_file(path))


def main_dtype(entries: Sequence[TensorEntry]) -> str:
    """Return the float dtype that most parameters have, by torch's name.

    Raises:
        UsageError: No tensor is of a float dtype.
    """
    counts: Counter[str] = Counter()
    for entry in entries:
        if entry.dtype in FLOATS:
            counts[FLOATS[entry.dtype]] += math.prod(entry.shape)
    if not counts:
        types = ", ".join(sorted({entry.dtype for entry in entries})) or "nothing"
        raise UsageError(f"The checkpoint has no weights in fp64, fp32, fp16 or bf16, but {types}.")
    return counts.most_common(1)[0][0]


def weight_bytes(entries: Sequence[TensorEntry], itemsize: int) -> int:
    """Return the bytes that a checkpoint's float tensors take in a type of `itemsize` bytes."""
    return itemsize * sum(math.prod(entry.shape) for entry in entries if entry.dtype in FLOATS)


def _single_beside_index(single: Path, index: Path) -> list[Path]:
    """Return the one file of a folder that has an index too: transformers reads the file, other tools the index.

    The index may be what is left of older shards, or of the same weights sharded.

    Raises:
        UsageError: The shards are all there and hold other weights, so it can't be known which are meant.
    """
    names = _indexed_names(index)
    shards = [index.parent / name for name in names]
    if names == [SINGLE] or not all(shard.is_file() for shard in shards):
        return [single]
    if weights_sha256(read_entries(shards)) != weights_sha256(read_entries([single])):
        raise UsageError(
            f"'{index.parent}' holds two models: {SINGLE}, and {INDEX} with its shards ({shorten_list(names)}), "
            "whose weights differ; keep the one that is meant in a folder of its own."
        )
    return [single]


def _indexed_files(index: Path) -> list[Path]:
    names, folder = _indexed_names(index), index.parent
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"'{folder}' is incomplete: {INDEX} lists {name}, which is missing; download it again.")
    return [folder / name for name in names]


def _indexed_names(index: Path) -> list[str]:
    """Return the files that an index lists, sorted; each lies beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(PurePath(name).name != name for name in names):
            raise ValueError(names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"'{index}' is not an index of safetensors files; download it again.") from error
    return names


def _file_entries(path: Path) -> list[TensorEntry]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, value, 8 + length, size) for name, value in header.items()]
        _check_cover(entries, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{path}' is torn or not safetensors ({error}); download it again.") from error
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, in which no name stands twice."""
    names = dict(pairs)
    if len(names) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"its header names {twice} twice")
    return names


def _entry(path: Path, name: str, value: dict[str, Any], base: int, size: int) -> TensorEntry:
    start, end = (base + _natural(offset, name) for offset in value["data_offsets"])
    if not base <= start <= end <= size:
        raise ValueError(f"the bytes of {name} end outside the file")
    dtype, shape = value["dtype"], tuple(_natural(length, name) for length in value["shape"])
    if dtype not in _BITS:
        raise ValueError(f"{name} is of the type {str(dtype)[:20]}, which is none of safetensors'")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{name} is {dtype} of {list(shape)}, but has {end - start} bytes")
    return TensorEntry(name, dtype, shape, path, start, end)


def _natural(number: object, name: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{name} has a size or place that is no whole number")
    return number


def _check_cover(entries: Sequence[TensorEntry], base: int, size: int) -> None:
    """Refuse tensors that share bytes, and bytes that are no tensor's: safetensors' own rule."""
    place = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != place:
            raise ValueError(f"the bytes of {entry.name} do not begin where those before it end")
        place = entry.end
    if place != size:
        raise ValueError(f"its tensors end {size - place} bytes before the file does")


def _hash(entries: Sequence[TensorEntry]) -> str:
    sha = hashlib.sha256()
    for entry in entries:
        sha.update(hash_header(entry.name, entry.dtype, entry.shape))
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
