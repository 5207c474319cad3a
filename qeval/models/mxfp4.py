"""Checkpoints whose experts are MXFP4, as gpt-oss publishes them, become folders of bfloat16 in the cache, once.

A stack of experts lies there as two tensors: `NAME_blocks` [experts, outputs, blocks, 16] uint8, two E2M1 codes a byte
and the first in the low bits, and `NAME_scales` [experts, outputs, blocks] uint8, each 2^(byte - 127) for 32 weights
along the inputs (OCP Microscaling Formats 1.0). The model keeps NAME as [experts, inputs, outputs]. Every value is a
bfloat16, so that nothing is rounded.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.checkpoint.cache import build_once
from qeval.models.checkpoint.safetensors_rows import read_rows
from qeval.models.checkpoint.shards import write_shards
from qeval.models.checkpoint.weights import TensorEntry, read_entries, weight_files, weights_sha256
from qeval.models.trust import clean_settings, known_files
from qeval.quant.elements import E2M1
from qeval.quant.floats import decode_element

_METHOD = "mxfp4"
"""The `quant_method` in the configuration of such a checkpoint."""
_CONVERSION_VERSION = 1
"""Raise it when the same files convert to other weights."""
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK, _BIAS = 32, 127
_SHARD_BYTES = 2 << 30
"""Of a file that is written, and so of what is dequantized in memory."""


def is_mxfp4(settings: Mapping[str, Any]) -> bool:
    """Return whether a configuration says that the weights are MXFP4 as gpt-oss publishes them."""
    section = settings.get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == _METHOD


def convert_mxfp4(folder: Path) -> Path:
    """Return the folder of bfloat16 that a checkpoint converts to, made where it isn't in the cache yet.

    Raises:
        UsageError: The checkpoint holds no such tensors, or codes without their scales.
        QevalError: The cache can't be written.
    """
    entries = read_entries(weight_files(folder))
    stacks = _stacks(entries, str(folder))
    key = digest({"weights_sha256": weights_sha256(entries), "conversion": _CONVERSION_VERSION})
    notes = [_sentence(entries, stacks)]
    return build_once(f"mxfp4-{key[:16]}", notes, lambda into: _convert(folder, entries, stacks, into))


def dequantize_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values of a stack of experts, as the model keeps it.

    Args:
        blocks: [experts, outputs, blocks, 16] uint8.
        scales: [experts, outputs, blocks] uint8.

    Returns:
        [experts, inputs, outputs] bfloat16.
    """
    experts, outputs, count, _ = blocks.shape
    values = torch.empty(experts, count * _BLOCK, outputs, dtype=torch.bfloat16)
    for expert in range(experts):
        codes = torch.stack([blocks[expert] & 0x0F, blocks[expert] >> 4], dim=-1).flatten(-2)
        powers = torch.exp2(scales[expert].float() - _BIAS).unsqueeze(-1)
        values[expert] = (decode_element(codes, E2M1) * powers).flatten(1).T
    return values


def _stacks(entries: Sequence[TensorEntry], where: str) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Return the codes and scales of each stack, by the name that the model has for it.

    Raises:
        UsageError: There are none, or the two don't fit each other.
    """
    by_name = {entry.name: entry for entry in entries}
    stacks = {}
    for name, blocks in by_name.items():
        if not name.endswith(_BLOCKS):
            continue
        stack = name.removesuffix(_BLOCKS)
        scales = by_name.get(stack + _SCALES)
        if scales is None:
            raise UsageError(f"'{where}' holds {name} without {stack}{_SCALES}; download it again.")
        sizes = (*scales.shape, _BLOCK // 2)
        if len(sizes) != 4 or blocks.shape != sizes or {blocks.dtype, scales.dtype} != {"U8"}:
            raise UsageError(
                f"'{where}' holds {name} as {blocks.dtype} {list(blocks.shape)}, which {scales.dtype} scales of "
                f"{list(scales.shape)} don't fit; download it again."
            )
        stacks[stack] = blocks, scales
    if not stacks:
        raise UsageError(
            f"'{where}' says that it is quantized by {_METHOD}, but holds no tensors *{_BLOCKS}; take the float model."
        )
    return stacks


def _sentence(entries: Sequence[TensorEntry], stacks: Mapping[str, tuple[TensorEntry, TensorEntry]]) -> str:
    """Return what a reader must know about weights that come from such a checkpoint."""
    quantized = sum(2 * (blocks.end - blocks.start) for blocks, _ in stacks.values())
    parts = {part.name for pair in stacks.values() for part in pair}
    total = quantized + sum(prod(entry.shape) for entry in entries if entry.name not in parts)
    return (
        f"The checkpoint keeps its experts as MXFP4 ({100 * quantized / total:.0f} % of the parameters), dequantized "
        "to bfloat16: the baseline is that checkpoint, not a model before it, and grids that match its own (mxfp4) "
        "look better than they are."
    )


def _convert(
    folder: Path,
    entries: Sequence[TensorEntry],
    stacks: Mapping[str, tuple[TensorEntry, TensorEntry]],
    into: Path,
) -> None:
    """Write the checkpoint with its stacks dequantized, and what lies around it."""
    settings = clean_settings(folder)
    del settings["quantization_config"]
    for path in known_files(folder):
        if path.name != "config.json":
            shutil.copyfile(path, into / path.name)
    (into / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    write_shards(_tensors(entries, stacks), into, shard_bytes=_SHARD_BYTES)


def _tensors(
    entries: Sequence[TensorEntry], stacks: Mapping[str, tuple[TensorEntry, TensorEntry]]
) -> Iterator[tuple[str, Tensor]]:
    parts = {part.name for pair in stacks.values() for part in pair}
    for entry in entries:
        if entry.name not in parts:
            yield entry.name, _whole(entry)
    for name, (blocks, scales) in stacks.items():
        yield name, dequantize_blocks(_whole(blocks), _whole(scales))


def _whole(entry: TensorEntry) -> Tensor:
    return read_rows(entry, 0, entry.shape[0] if entry.shape else 1)
