"""`--stream`: the model read a layer at a time, and variants made a matrix at a time."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from qeval.backends.memory import return_large_blocks
from qeval.backends.stream.backend import StreamBackend, inspect, scaled_inputs, streamed, streamed_head_shapes
from qeval.backends.stream.calibration import LayerStatistics, Live, Passes, RelayedText, run_streamed
from qeval.backends.stream.trials import StreamedTrials
from qeval.backends.stream.turned import rotated_stream
from qeval.backends.stream.variant_reader import SavedVariant, saved_variant
from qeval.compare.schemes import check_reached, scheme_details
from qeval.compare.settings import ModelChoice
from qeval.compare.stream_memory import room_for_states
from qeval.compare.variants import BaselineModel, Calibration, Workshop
from qeval.config import Recipe
from qeval.models.checkpoint.safetensors_rows import StoredTensor
from qeval.models.checkpoint.weights import read_entries, weight_files
from qeval.models.device import check_device, free_bytes
from qeval.models.info import LoadedModel
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.models.structure.graph import Group
from qeval.models.structure.kv_cache import HeadShape
from qeval.models.structure.precision import keep_sums_in_fp32, set_exact_sums
from qeval.models.structure.supported import support_notes
from qeval.paths import home
from qeval.progress import Advance, Progress
from qeval.quant.grid import WeightGrid
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_by_rows
from qeval.quant.scheme import RotationPlaces
from qeval.quant.variant import Variant
from qeval.quantize.build import plan_variant
from qeval.quantize.context import Source
from qeval.quantize.quantizers import (
    RoundedGroups,
    gptq_options,
    quantize_alone,
    rounding_units_of,
    with_floats,
    with_outcomes,
)
from qeval.quantize.ranges import collect_ranges
from qeval.quantize.scaling import Search
from qeval.quantize.sequential import RoundedMatrix, round_layer
from qeval.store.spill import Spill, open_spill
from qeval.store.variant_blocks import save_variant_by_parts, save_with_scheme
from qeval.store.variants import Origin, save_variant

WeightParts = Iterator[tuple[str, QWeight]]
_HEAD_BYTES = 16
"""What a weight of the head takes while it is quantized: in the type that is computed in, in fp32, as codes, packed."""


def streamed_model(choice: ModelChoice, *, folds: bool) -> tuple[LoadedModel, BaselineModel, StreamBackend]:
    """Return the model that a choice names, what variants are made from, and the backend that streams it.

    `folds`: whether what takes inputs' scales is looked for, which variants of AWQ need.

    Raises:
        UsageError: it can't be streamed, or not within the memory allowed.
    """
    return_large_blocks()
    loaded = load_model(
        resolve(choice.name, choice.revision), device=choice.device, dtype=choice.compute, weightless=True
    )
    entries = read_entries(weight_files(loaded.folder))
    compute = loaded.info.compute_dtype
    device = check_device(choice.device)
    set_exact_sums()
    keep_sums_in_fp32(loaded.model, device)
    stream = streamed(loaded.model, entries, device, compute)
    description, head = inspect(stream, compute, folds=folds)
    notes = (*loaded.info.notes, *support_notes(loaded.model, description))
    loaded = replace(loaded, info=replace(loaded.info, notes=notes))
    backend = StreamBackend(stream, description, head, choice.max_memory or free_bytes(stream.device) // 2)
    source = StreamedModel(
        model=loaded.model,
        description=description,
        head=head,
        weights_sha256=loaded.info.weights_sha256,
        config_sha256=loaded.config_sha256,
        name=choice.name,
        weight_dtype=getattr(torch, loaded.info.weight_dtype),
        compute_dtype=getattr(torch, compute),
        device=device,
        backend=backend,
    )
    return loaded, source, backend


@dataclass(frozen=True, eq=False)
class StreamedModel(BaselineModel):
    """A model whose layers are read one at a time, and the backend that reads them."""

    backend: StreamBackend

    def workshop(self, calibration: Callable[[], Calibration], seed: int, progress: Progress) -> "StreamWorkshop":
        """Return what makes variants straight from the checkpoint."""
        return StreamWorkshop(self, calibration, self.backend, seed, progress)

    def check_rotation(self, places: RotationPlaces) -> None:
        """Refuse places in which the model can't be rotated; all layers are read for that, several times."""
        with rotated_stream(self.backend, self.description, places):
            pass

    def head_shapes(self) -> Sequence[HeadShape]:
        """Return the shapes of the keys and values by layer; all layers are read for that once.

        Raises:
            UsageError: Attention does not read what its cache returns, so that they can't be rounded.
        """
        return self._shapes

    @cached_property
    def _shapes(self) -> list[HeadShape]:
        return streamed_head_shapes(self.backend.stream)

    def check_room(self, recipe: Recipe, samples: Sequence[Sequence[int]]) -> None:
        """Refuse a calibrated recipe for which memory does not hold even one layer at work.

        Raises:
            UsageError: It says how much memory would.
        """
        room_for_states(self.backend, self, recipe, samples)


class StreamWorkshop(Workshop):
    """Makes variants straight from the checkpoint to their folder: by matrices, or by layers where text is needed."""

    def __init__(
        self,
        loaded: "StreamedModel",
        calibration: Callable[[], Calibration],
        backend: StreamBackend,
        seed: int,
        progress: Progress,
    ) -> None:
        """`backend` reads the model's tensors, within its limit on memory."""
        super().__init__(loaded, calibration, seed, progress)
        self._streamed, self._stream, self._backend = loaded, backend.stream, backend
        self._parameters = Live(loaded.model, loaded.description.head)
        self._open = ExitStack()
        self._statistics: LayerStatistics | None = None

    def close(self) -> None:
        """Let go of the calibration text's states and statistics."""
        self._open.close()
        self._statistics = None

    @torch.inference_mode()
    def write(self, recipe: Recipe, folder: Path) -> None:
        """Make the variant as the whole model's is made, a matrix or a layer at a time.

        Raises:
            UsageError: memory does not hold what it takes.
        """
        if recipe.scheme:
            self._write_with_scheme(recipe, folder)
            return
        if recipe.rotations is None:
            self._write_weights(recipe, folder, lambda variant: variant)
            return
        with rotated_stream(self._backend, self._loaded.description, recipe.rotations) as turned:
            loaded = replace(self._streamed, description=turned.description, backend=turned.backend)
            workshop = StreamWorkshop(loaded, self._calibration, turned.backend, self._seed, self._progress)
            try:
                workshop._write_weights(recipe, folder, turned.completed)
            finally:
                workshop.close()

    def _write_weights(self, recipe: Recipe, folder: Path, complete: Callable[[Variant], Variant]) -> None:
        """Write the variant of a recipe's weights alone; `complete` adds what a rotation changed."""
        start = time.perf_counter()
        source, passes = self._source_of(recipe)
        grids, plan = self.outline(source, recipe)
        with self._quantizing(recipe, plan) as advance:
            job = _Job(source, passes, recipe, grids, plan, advance)
            parts = self._in_order(job) if recipe.quant_method.rounding == "sequential" else self._alone(job)

            def rest() -> tuple[Variant, Origin]:
                return complete(job.finished()), self.origin(recipe, time.perf_counter() - start)

            save_variant_by_parts(itertools.chain(parts, self._head(job)), rest, folder)

    def _write_with_scheme(self, recipe: Recipe, folder: Path) -> None:
        """Write the variant of a recipe's weights alone, which the cache holds or gets, with the recipe's scheme."""
        start, scheme = time.perf_counter(), recipe.scheme
        details = scheme_details(scheme, self._loaded.model, self._loaded.head_shapes)
        if recipe.quant_method.rounding == "none":
            _, plan = plan_variant(self._source(False, False), recipe, self.key(recipe), _ignore)
            ranges = self._ranges(recipe, plan.activation_inputs, None)
            variant = replace(plan, scheme=scheme, ranges=ranges, details={**plan.details, **details})
            save_variant(variant, folder, self.origin(recipe, time.perf_counter() - start))
            return
        weights = self.folder(recipe.weights_alone)
        saved = saved_variant(weights)
        # as with the model in memory, the float model's ranges unless scales were folded into weights
        folds = bool(saved.input_scales or (saved.manifest.floats and not saved.manifest.stored))
        ranges = self._ranges(recipe, saved.manifest.activation_inputs, saved if folds else None)
        details = {**saved.manifest.details, **details}
        variant = Variant(self.key(recipe), {}, {}, {}, (), details=details, scheme=scheme, ranges=ranges)
        seconds = saved.manifest.seconds + time.perf_counter() - start
        save_with_scheme(weights, variant, self.origin(recipe, seconds), folder)

    def _ranges(
        self, recipe: Recipe, inputs: Sequence[str], variant: SavedVariant | None
    ) -> Mapping[str, torch.Tensor]:
        """Return the largest magnitudes of a recipe's static formats, with a variant's weights or the model's own."""
        if not recipe.scheme.is_static:
            return {}
        loaded, samples = self._loaded, self._calibration().samples
        names = [name for name in inputs if name != loaded.description.head]
        left = room_for_states(self._backend, loaded, recipe, samples)
        units = sum(map(len, samples)) * len(self._stream.layers)
        # before what looks at inputs, which then sees them scaled
        scaled = nullcontext() if variant is None else scaled_inputs(self._stream, variant)
        outside = nullcontext() if variant is None else self._stream.outside_of(variant)
        with (
            scaled,
            outside,
            open_spill(_spill_folder(), in_memory=left) as states,
            self._progress.phase(f"calibrate {recipe.name}", units) as advance,
        ):
            run = partial(run_streamed, self._stream, variant, samples, states, advance)
            ranges = collect_ranges(loaded.model, names, recipe.scheme, run)
        check_reached(recipe, ranges, names)
        return ranges

    def _source_of(self, recipe: Recipe) -> tuple[Source, Passes]:
        """Return what a recipe is built from, and the passes over the layers that it takes."""
        loaded, samples = self._loaded, self._calibration().samples if recipe.calibrated else ()
        left = 0
        if recipe.calibrated:
            left = room_for_states(self._backend, loaded, recipe, samples) // 2
        statistics = self._collected(samples, left) if recipe.needs_statistics else None
        search = Search(self._parameters, {} if statistics is None else statistics)
        passes = Passes(self._stream, search, statistics)
        trials = StreamedTrials(
            self._stream, loaded.description, samples, passes, lambda: self._backend.head, self._backend.logit_rows,
            lambda: Spill(_spill_folder(), in_memory=left),
        )  # fmt: skip
        source = Source(
            loaded.model, loaded.description, loaded.head, samples, search, trials, loaded.float_bits,
            all_experts=recipe.calibrated and self._all_experts,
        )  # fmt: skip
        return source, passes

    @property
    def _all_experts(self) -> bool:
        """Return whether each expert is calibrated on every token."""
        return self._calibration().all_experts

    def _collected(self, samples: Sequence[Sequence[int]], in_memory: int) -> LayerStatistics:
        """Return the statistics of the text, collected as layers are reached for the first time, for all recipes."""
        if self._statistics is None:
            states, sums = (self._open.enter_context(open_spill(_spill_folder(), in_memory=n)) for n in (in_memory, 0))
            text = RelayedText(self._stream, self._loaded.description, samples, states, all_experts=self._all_experts)
            groups = self._loaded.description.groups
            self._statistics = LayerStatistics(text, self._stream, groups, self._seed, sums)
        return self._statistics

    def _alone(self, job: "_Job") -> WeightParts:
        """Quantize every group for the inputs that the float model gives it."""
        if job.recipe.needs_statistics:
            with job.passes.forward() as layers:
                for layer in layers:
                    groups = self._groups(layer)
                    rounded = quantize_alone(job.source.search, groups, job.recipe, job.grids, job.advance)
                    job.rounded.append(rounded._replace(weights={}))
                    yield from rounded.weights.items()
            return
        for group in self._loaded.description.groups:
            for name in (name for name in group.names if name in job.grids):
                search = Search({name: self._matrix(name)}, {})
                rounded = quantize_alone(search, [group], job.recipe, {name: job.grids[name]}, job.advance)
                yield from rounded.weights.items()

    def _in_order(self, job: "_Job") -> WeightParts:
        """Quantize every group for what the quantized groups before it give it."""
        options, left = (
            gptq_options(job.recipe),
            room_for_states(self._backend, self._loaded, job.recipe, job.source.samples),
        )
        with open_spill(_spill_folder(), in_memory=left) as states, job.passes.forward() as layers:
            text = RelayedText(
                self._stream, self._loaded.description, job.source.samples, states, all_experts=job.source.all_experts
            )
            for layer in layers:
                found = round_layer(text, self._groups(layer), job.grids, options, job.advance)
                for outcome in found:
                    yield outcome.name, outcome.rounded.weight
                    self._parameters[outcome.name].copy_(outcome.rounded.weight.dequantize())
                    light = outcome.rounded._replace(weight=job.plan.weights[outcome.name])
                    job.outcomes.append(outcome._replace(rounded=light))
                text.pass_layer()

    def _head(self, job: "_Job") -> WeightParts:
        """Yield the head, as many rows of it at a time as memory allows."""
        name = self._loaded.description.head
        for part in quantize_by_rows(self._head_rows, job.grids[name]) if name in job.grids else ():
            yield name, part
            job.advance(rounding_units_of(job.recipe, part.codes.numel()))

    def _head_rows(self) -> Iterator[torch.Tensor]:
        stored = self._stream.checkpoint[self._stream.head_name]
        rows, columns = stored.shape
        step = max(1, self._backend.budget.head // (stored.raw_bytes // rows + _HEAD_BYTES * columns))
        for start in range(0, rows, step):
            yield self._rows(stored, start, min(start + step, rows)).float()

    def _groups(self, layer: int) -> list[Group]:
        return [group for group in self._loaded.description.groups if group.layer == layer]

    def _matrix(self, name: str) -> torch.Tensor:
        """Return a matrix in the type that it is computed in, as the whole model would hold it."""
        stored = self._stream.checkpoint[name]
        return self._rows(stored, 0, stored.shape[0])

    def _rows(self, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
        rows = torch.empty(stop - start, stored.shape[1], dtype=self._loaded.head.weight.dtype)
        stored.decode(stored.fetch(start, stop), rows)
        return rows


@dataclass(frozen=True, eq=False)
class _Job:
    """One variant in the making: what it is made by, and what of its layers is known so far beside their matrices."""

    source: Source
    passes: Passes
    recipe: Recipe
    grids: Mapping[str, WeightGrid]
    plan: Variant
    advance: Advance
    rounded: list[RoundedGroups] = field(default_factory=list)
    outcomes: list[RoundedMatrix] = field(default_factory=list)

    def finished(self) -> Variant:
        """Return the variant but for its matrices' numbers."""
        if self.recipe.quant_method.rounding == "sequential":
            return with_outcomes(self.plan, self.recipe, self.outcomes)
        return with_floats(self.plan, self.recipe, self.rounded)


def _ignore(_: int) -> None:
    """Show no progress of work that is done at once."""


def _spill_folder() -> Path:
    return home() / "variants"
