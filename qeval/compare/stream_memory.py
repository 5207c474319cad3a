"""Bytes that making a variant takes while a model is streamed, beside the weights that are read."""

from collections.abc import Sequence

import torch

from qeval.backends.stream.backend import StreamBackend
from qeval.compare.variants import BaselineModel
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.checkpoint.meta_model import names_of_parameters
from qeval.models.structure.weight_views import weights_of
from qeval.quant.statistics import SKETCH_ROWS

_SEARCH_BYTES = 16 << 20
"""Bytes that AWQ's searches take whatever the layer's size: candidates and their products, a few rows at a time."""


def room_for_states(
    backend: StreamBackend, loaded: BaselineModel, recipe: Recipe, samples: Sequence[Sequence[int]]
) -> int:
    """Return the bytes that hidden states may take in memory while a calibrated variant is made.

    Raises:
        UsageError: not even one layer can be worked on within --max-memory, or layers share a block.
    """
    _check_own_weights(loaded, recipe)
    working = working_bytes(loaded, recipe) + backend.budget.token_activations * max(map(len, samples), default=0)
    left = backend.budget.left_for_states(working)
    if left < 0:
        raise UsageError(
            f"--max-memory {backend.budget.total / 2**20:.0f}MiB is less than making '{recipe.name}' takes, one layer "
            f"at a time; give at least {backend.budget.least_for(working) / 2**20 + 1:.0f}MiB."
        )
    return left


def _check_own_weights(loaded: BaselineModel, recipe: Recipe) -> None:
    """Refuse a model whose layers share weights: what reaches them is known once all of those layers ran."""
    for names in names_of_parameters(loaded.model).values():
        owners = {layer for layer in loaded.description.layers for name in names if name.startswith(f"{layer}.")}
        if len(owners) > 1:
            raise UsageError(
                f"'{recipe.name}' is calibrated, and {len(owners)} layers of {type(loaded.model).__name__} share "
                f"weights ({names[0]}), whose inputs no layer alone shows; leave --stream out, or take rtn."
            )


def working_bytes(loaded: BaselineModel, recipe: Recipe) -> int:
    """Return the most bytes that quantizing a layer takes beside its weights and text: statistics, searches, codes."""
    parameters, description = weights_of(loaded.model), loaded.description
    by_layer = [[g for g in description.groups if g.layer == layer] for layer in range(len(description.layers))]
    sizes = [[[parameters[name].numel() for name in group.names] for group in groups] for groups in by_layer]
    columns = [[group.columns for group in groups] for groups in by_layer]
    work = _rounding_bytes if recipe.quant_method.rounding == "sequential" else _search_bytes
    copies = 1 if loaded.head.weight.dtype == torch.float32 else 2  # others are converted first
    return max(work(*sizes_of_layer, copies) for sizes_of_layer in zip(sizes, columns, strict=True))


def _search_bytes(sizes: list[list[int]], columns: list[int], copies: int) -> int:
    """Return what AWQ or a clip search takes: sketches; a group's rows parted, or a matrix scaled beside all codes."""
    statistics = 4 * SKETCH_ROWS * (sum(columns) + max(columns))
    group, matrix = max(map(sum, sizes)), max(map(max, sizes))
    return statistics + max(4 * copies * group, sum(map(sum, sizes)) + 8 * copies * matrix) + _SEARCH_BYTES


def _rounding_bytes(sizes: list[list[int]], columns: list[int], copies: int) -> int:
    """Return what GPTQ takes: all second moments; one's factors in fp64 and a matrix by columns, beside all codes."""
    matrix, codes = max(map(max, sizes)), sum(map(sum, sizes))
    return 4 * sum(n * n for n in columns) + 48 * max(columns) ** 2 + 24 * copies * matrix + codes + _SEARCH_BYTES
