"""A written checkpoint read again by qeval's own reader and compared with the variant that it was written from."""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qeval.errors import QevalError
from qeval.formats.assemble import decode_weight
from qeval.formats.base import DecodedMatrix, Values
from qeval.formats.checkpoint import open_checkpoint, read_quantization
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.names import TensorNames
from qeval.formats.registry import format_of
from qeval.models.gguf.reader import gguf_errors, open_gguf
from qeval.models.gguf.settings import metadata_of
from qeval.models.gguf.tensors import state_of
from qeval.models.info import LoadedModel
from qeval.quant.grid import FloatGrid
from qeval.quant.qweight import QWeight
from qeval.quant.variant import Variant

_RECIPROCAL = 2.0**-22
"""The most that values on NVFP4 change, relative, where its second scale was kept as its reciprocal in fp32."""


class ReadBack(NamedTuple):
    """The numbers of matrices and of other tensors that were compared, and how far a value was off.

    `largest_difference`: of a dequantized value, relative.
    """

    matrices: int
    floats: int
    largest_difference: float


def read_back(folder: Path, variant: Variant, baseline: BaselineWeights) -> ReadBack:
    """Read every weight of a written checkpoint and compare it with the variant's.

    Args:
        folder: The checkpoint.
        variant: What it was written from.
        baseline: The model that the variant changes.

    Raises:
        QevalError: A code, a scale, a zero point or a float is another one.
        UsageError: The reader refuses the checkpoint.
    """
    config = read_quantization(folder) or {}
    reads = format_of(config, str(folder))
    reads.notes(config)
    largest = 0.0
    others = [name for name in _needed(variant, baseline) if name not in variant.weights]
    with open_checkpoint(folder) as tensors:
        names = TensorNames(tensors, baseline.prefix)
        for name, weight in variant.weights.items():
            read = decode_weight(names, reads, config, name, baseline.parameters[name])
            difference = relative_difference(read, weight)
            if not _is_same(read, weight, difference):
                raise QevalError(f"{folder} does not hold {name} as it was made; what was written is thrown away.")
            largest = max(largest, difference)
        for name in others:
            stored = baseline.as_matrix(name, names.load(name), names.stored(name))
            if not _same_floats(stored, name, variant, baseline):
                raise QevalError(f"{folder} holds another {name} than the variant; what was written is thrown away.")
    return ReadBack(len(variant.weights), len(others), largest)


def read_gguf_back(path: Path, loaded: LoadedModel, variant: Variant | None, baseline: BaselineWeights) -> ReadBack:
    """Read a written GGUF file as qeval reads such files, in fp32, and compare every weight.

    Args:
        path: The file.
        loaded: The model that it was written from.
        variant: The variant; None for the model itself.
        baseline: The model's weights.

    Raises:
        QevalError: A value is another one.
        UsageError: The reader refuses the file.
    """
    with gguf_errors(path):
        reader = open_gguf(path)
        model = _untied(loaded.model) if has_own_head(variant, baseline) else loaded.model
        state = state_of(reader, metadata_of(reader, path), model, torch.float32)
    weights = variant.weights if variant else {}
    floats = dict(variant.floats) if variant else {}
    needed = _needed(variant, baseline)
    for name in needed:
        own = floats.get(name, baseline.parameters[name])
        meant = weights[name].dequantize() if name in weights else own.float().cpu()
        if not torch.equal(state[name], meant):
            raise QevalError(f"{path.name} holds another {name} than the variant; what was written is thrown away.")
    return ReadBack(len(weights), len(needed) - len(weights), 0.0)


def has_own_head(variant: Variant | None, baseline: BaselineWeights) -> bool:
    """Return whether a variant has a head beside the embedding that the model's own is tied with, as R1 makes it."""
    head = baseline.description.head
    return variant is not None and baseline.description.tied and (head in variant.floats or head in variant.weights)


def _needed(variant: Variant | None, baseline: BaselineWeights) -> list[str]:
    """Return the parameters that a file of a variant must hold."""
    head = [baseline.description.head] if has_own_head(variant, baseline) else []
    return [*baseline.needed, *head]


def _untied(model: Any) -> Any:
    """Return a model without weights, of the same configuration but with a head of its own."""
    config = deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        return type(model)(config)


def relative_difference(read: DecodedMatrix, weight: QWeight) -> float:
    """Return the largest difference of two matrices' values, relative to the value that was meant."""
    meant = weight.dequantize()
    values = read.values if isinstance(read, Values) else read.dequantize()
    differs = values != meant
    if not differs.any():
        return 0.0
    return float(((values - meant).abs() / meant.abs())[differs].max())


def _is_same(read: DecodedMatrix, weight: QWeight, difference: float) -> bool:
    """Return whether codes, scales and zero points are bit for bit the same; of small floats their product."""
    if isinstance(read, Values):
        rounds = isinstance(weight.grid, FloatGrid) and weight.grid.has_global_scale
        return difference <= (_RECIPROCAL if rounds else 0.0)
    same_scales = torch.equal(read.scales, weight.scales)
    return torch.equal(read.codes, weight.codes) and same_scales and torch.equal(_zeros(read), _zeros(weight))


def _zeros(weight: QWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, 1 << (weight.grid.bits - 1), dtype=torch.uint8)


def _same_floats(stored: Tensor, name: str, variant: Variant, baseline: BaselineWeights) -> bool:
    if name in variant.floats:
        return torch.equal(stored.float(), variant.floats[name].float())
    own = baseline.parameters[name]
    return torch.equal(stored.to(own.dtype), own.cpu())
