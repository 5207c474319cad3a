"""`--stream`: the model read a layer at a time, and variants made a matrix at a time."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from qeval.backends.memory import free_bytes, return_large_blocks
from qeval.backends.stream.backend import StreamBackend, Streamed, inspect, streamed
from qeval.calibrate.build import outline, source_of
from qeval.calibrate.groups import Search, quantize_groups
from qeval.compare.settings import ModelChoice
from qeval.compare.variants import Calibration, Loaded, Workshop
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.graph import Group
from qeval.models.info import LoadedModel
from qeval.models.load import check_device, load
from qeval.models.source import resolve
from qeval.models.supported import notes_of
from qeval.models.weights import read_entries, weight_files
from qeval.progress import Progress
from qeval.quant.grid import Grid
from qeval.quant.qweight import QWeight
from qeval.store.variants import Origin, save_variant_by_parts


def streamed_model(choice: ModelChoice) -> tuple[LoadedModel, Loaded, StreamBackend]:
    """The model that a choice names, what variants are made from, and the backend that streams it.

    Raises:
        UsageError: it can't be streamed, or not within the memory allowed.
    """
    return_large_blocks()
    loaded = load(resolve(choice.name, choice.revision), device=choice.device, dtype=choice.compute, weightless=True)
    entries = read_entries(weight_files(loaded.folder))
    compute = loaded.info.compute_dtype
    made = streamed(loaded.model, entries, check_device(choice.device), compute)
    description, head = inspect(made, compute)
    notes = (*loaded.info.notes, *notes_of(loaded.model, description))
    loaded = replace(loaded, info=replace(loaded.info, notes=notes))
    source = Loaded(
        model=loaded.model,
        description=description,
        head=head,
        weights_sha256=loaded.info.weights_sha256,
        config_sha256=loaded.config_sha256,
        name=choice.name,
        weight_dtype=getattr(torch, loaded.info.weight_dtype),
    )
    allowed = choice.max_memory or free_bytes(made.device) // 2
    return loaded, source, StreamBackend(made, description, head, allowed)


class StreamWorkshop(Workshop):
    """Makes variants that need no calibration, a matrix at a time, straight from the checkpoint to their folder."""

    def __init__(self, loaded: Loaded, made: Streamed, seed: int, progress: Progress) -> None:
        """`made` reads the model's tensors."""
        super().__init__(loaded, _no_calibration, seed, progress)
        self._made = made

    def _save(self, recipe: Recipe, folder: Path) -> None:
        start = time.perf_counter()
        source = source_of(self._loaded.model, self._loaded.description, self._loaded.head, (), {})
        grids, plan = outline(source, recipe, self.key(recipe))
        with self._progress.phase(f"quantize {recipe.name}", len(plan.weights)) as advance, torch.inference_mode():

            def parts() -> Iterator[tuple[str, QWeight]]:
                for made in self._parts(grids, clip=recipe.clips):
                    yield made
                    advance(1)

            def origin() -> Origin:
                return self.origin(recipe, time.perf_counter() - start)

            save_variant_by_parts(plan, parts(), folder, origin)

    def _parts(self, grids: Mapping[str, Grid], *, clip: bool) -> Iterator[tuple[str, QWeight]]:
        description = self._loaded.description
        head = Group(len(description.layers), "head", (description.head,), 0, None)
        for group in (*description.groups, head):
            for name in group.names:
                if name in grids:
                    search = Search({name: self._matrix(name)}, {})
                    clips = clip and group is not head
                    yield from quantize_groups(search, [group], {name: grids[name]}, {}, {}, clip=clips).items()

    def _matrix(self, name: str) -> torch.Tensor:
        """A matrix in the type that it is computed in, as the whole model would hold it."""
        held = self._made.head_name if name == self._loaded.description.head else name
        stored, dtype = self._made.checkpoint[held], self._loaded.head.weight.dtype
        matrix = torch.empty(stored.shape, dtype=dtype)
        stored.decode(stored.fetch(0, stored.shape[0]), matrix)
        return matrix


def _no_calibration() -> Calibration:
    raise UsageError("Calibrating needs the whole model in memory; leave --stream out.")
