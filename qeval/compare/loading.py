"""The model that a run is about: loaded from where its name says, streamed, or in memory already."""

from dataclasses import replace
from typing import Any

import torch

from qeval.backends.base import BaselineBackend
from qeval.backends.torch import TorchBackend
from qeval.compare.settings import ModelChoice
from qeval.compare.stream import streamed_model
from qeval.compare.variants import BaselineModel
from qeval.errors import UsageError
from qeval.identity import digest
from qeval.models.in_memory import MemoryModel
from qeval.models.info import LoadedModel, needs_folder
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.precision import set_exact_sums, sums_in_fp32_where_possible
from qeval.models.structure.supported import support_notes
from qeval.progress import Progress


def loaded_model(
    choice: ModelChoice, memory: MemoryModel | None = None, *, folds: bool = False
) -> tuple[LoadedModel, BaselineModel, BaselineBackend[Any]]:
    """Load a choice's model unless it is in memory; return it, what variants are made from, and its backend.

    `folds`: whether a streamed model is looked at for what takes its inputs' scales; others always are.

    Raises:
        UsageError: it can't be loaded, scored or quantized, or is in memory and to be streamed.
    """
    if choice.stream:
        if memory is not None:
            raise UsageError(needs_folder("Streaming"))
        return streamed_model(choice, folds=folds)
    loaded, source = source_of_model(choice, memory)
    return loaded, source, TorchBackend(loaded.model, source.description, source.head, source.weight_dtype)


def source_of_model(choice: ModelChoice, memory: MemoryModel | None = None) -> tuple[LoadedModel, BaselineModel]:
    """Return the model that a choice names (or that is in memory already), and what variants are made from.

    Raises:
        UsageError: it can't be loaded, scored or quantized.
    """
    if memory is None:
        source, spread = resolve(choice.name, choice.revision), choice.device_map is not None
        loaded = load_model(source, device=choice.device, dtype=choice.compute, spread=spread)
    else:
        loaded = memory.load(choice.compute)
    set_exact_sums()
    mixed = sums_in_fp32_where_possible(loaded.model)
    description = describe_model(loaded.model)
    notes = (*loaded.info.notes, *mixed, *support_notes(loaded.model, description))
    loaded = replace(loaded, info=replace(loaded.info, notes=notes))
    return loaded, BaselineModel(
        model=loaded.model,
        description=description,
        head=head_of(loaded.model),
        weights_sha256=loaded.info.weights_sha256,
        config_sha256=loaded.config_sha256,
        name=choice.name,
        weight_dtype=getattr(torch, loaded.info.weight_dtype),
        compute_dtype=getattr(torch, loaded.info.compute_dtype),
        device=loaded.model.device,
    )


def baseline_key(loaded: LoadedModel, device: str, compute: str) -> str:
    """Return the identity of the baseline's numbers: weights, configuration, compute type, kind of device.

    Args:
        loaded: The model.
        device: As the settings name it, such as `cuda:1`: which one of its kind it is changes no number.
        compute: The type of the arithmetic, such as `float32`.
    """
    parts = {"weights": loaded.info.weights_sha256, "config": loaded.config_sha256}
    return digest({**parts, "compute": compute, "device": device.partition(":")[0]})


def tell_warnings(loaded: LoadedModel, progress: Progress) -> None:
    """Say what must be told of how a model was had today, such as a copy in the cache of a hub that does not answer."""
    for warning in loaded.warnings:
        progress.warn(warning)
