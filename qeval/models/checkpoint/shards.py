"""A checkpoint's weights written: safetensors files of a limited size, with an index where they are several."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from qeval.files.tensors import save_tensors
from qeval.models.checkpoint.weights import INDEX, SINGLE

_SHARD_BYTES = 5_000_000_000


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write tensors to safetensors files of so many bytes at most, with an index where they are several.

    Raises:
        OSError: They can't be written.
    """
    shards: list[list[str]] = []
    size = 0
    for part in _parts(tensors, shard_bytes):
        save_tensors(part, folder / f"part-{len(shards)}", {"format": "pt"})
        shards.append([*part])
        size += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
    files = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    else:
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)


def _parts(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield tensors by name, as many at a time as are so many bytes; one that is larger comes alone."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if part and size + more > most_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += more
    yield part
