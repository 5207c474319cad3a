"""The variants of a run: made once, kept in the cache under what they were made from, read back when scored."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qeval.backends.base import Saved
from qeval.backends.memory import reason_of, with_room_made
from qeval.compare.record import coverage_warning, variant_record
from qeval.compare.schemes import NOT_ROUNDED, check_scheme, details_of_weights, with_scheme
from qeval.compare.sensitivity_cache import Remembered
from qeval.config import Recipe
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.files.locks import alone
from qeval.identity import digest
from qeval.models.device import release_cached
from qeval.models.structure.graph import Description
from qeval.models.structure.head import Head
from qeval.models.structure.kv_cache import HeadShape, check_cache
from qeval.paths import home
from qeval.progress import Advance, Progress
from qeval.quant.grid import WeightGrid
from qeval.quant.rotation import ROTATIONS_VERSION
from qeval.quant.scheme import RotationPlaces, Scheme
from qeval.quant.statistics import SKETCH_ROWS
from qeval.quant.variant import Variant
from qeval.quantize.build import plan_variant, possible_grids, quantizable, source_of
from qeval.quantize.context import Source
from qeval.quantize.mix import check_samples, trial_units
from qeval.quantize.quantizers import quantize_plan, rounding_units
from qeval.quantize.rotating import check_rotation, rotated_model
from qeval.quantize.sensitivity import EVERY, SENSITIVITY_LENGTH, SENSITIVITY_SAMPLES, trial_passes
from qeval.quantize.statistics import collect
from qeval.quantize.tools.registry import tool_version
from qeval.store.run import OverlapRecord, VariantRecord
from qeval.store.variants import Origin, load_variant, read_manifest, save_variant, verify_variant
from qeval.tasks.contamination import Fingerprint

FISHER_VERSION = 2
"""Of how Fisher labels are drawn."""
FLOAT_KINDS_VERSION = 1
"""Of which matrices stay in float whatever a recipe says."""
QUANTIZERS_VERSION = 3
"""Part of every variant's key: raise it when the same recipe gives other integers."""


@dataclass(frozen=True)
class Calibration:
    """The calibration text as token ids, and what a record says of it."""

    samples: tuple[tuple[int, ...], ...]
    record: Mapping[str, Any]
    all_experts: bool = False
    """Whether each expert sees every token of it."""


@dataclass(frozen=True, eq=False)
class BaselineModel:
    """The model that variants are made from."""

    model: Any
    description: Description
    head: Head
    weights_sha256: str
    config_sha256: str
    name: str
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    """Where the model computes; a streamed model's parameters say nothing of it."""

    @property
    def arithmetic(self) -> dict[str, str]:
        """The settings of the arithmetic that change the integers; none in fp32 on the CPU, so that older keys hold."""
        if self.device.type == "cpu" and self.compute_dtype == torch.float32:
            return {}
        return {"device": self.device.type, "compute": str(self.compute_dtype).removeprefix("torch.")}

    @property
    def float_bits(self) -> int:
        """Bits of a weight in the checkpoint."""
        return self.weight_dtype.itemsize * 8

    def head_shapes(self) -> Sequence[HeadShape]:
        """Return the shapes of the keys and values by layer.

        Raises:
            UsageError: Attention does not read what its cache returns, so that they can't be rounded.
        """
        return check_cache(self.model)

    def check_rotation(self, places: RotationPlaces) -> None:
        """Refuse places in which the model can't be rotated."""
        check_rotation(self.model, self.description, self.head, places)

    def workshop(self, calibration: Callable[[], Calibration], seed: int, progress: Progress) -> "Workshop":
        """Return what makes variants of the model; `calibration` is called when the first calibrated recipe is met."""
        return Workshop(self, calibration, seed, progress)

    def check_room(self, recipe: Recipe, samples: Sequence[Sequence[int]]) -> None:
        """Do nothing: a model in memory has no limit that a calibrated recipe could exceed."""


@dataclass(frozen=True)
class VariantEntry:
    """One variant of a run: where it lies, or why it failed."""

    name: str
    method: str
    folder: Path | None
    error: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """What a reader must know of it in this run, beside what its manifest says."""
    overlap: OverlapRecord | None = None
    """What the text that it was calibrated on before this run shares with what is scored; None: that is not known."""
    content: str | None = None
    """The sha256 of its weights, where its own manifest alone says what it was made from."""
    gguf: Path | None = None  # the file that it was read from
    scheme: Scheme | None = None
    """The formats of what is rounded beside its weights, where its manifest says others."""
    checkpoint: Path | None = None  # the folder that another tool wrote, which it was read from
    part_of: str | None = None  # the variant whose weights alone this is, where both are scored

    @property
    def target(self) -> Saved:
        """The target that a backend opens."""
        assert self.folder is not None
        return Saved(self.folder, self.gguf, self.scheme, self.checkpoint)

    @property
    def identity(self) -> dict[str, str]:
        """The identity of its weights: its key, and their content where the key is what a manifest claims."""
        key = {"variant": read_manifest(self.target.folder).key}
        if self.scheme is not None:
            key |= {"scheme": ", ".join(f"{part} {name}" for part, name in self.scheme.names().items())}
        return key if self.content is None else {**key, "content": self.content}

    def record(self, name: str, backend: str, seconds: float) -> VariantRecord:
        """Return what a run says of it, scored on a backend in so many seconds."""
        manifest = read_manifest(self.target.folder)
        if self.scheme is not None:
            manifest = manifest.model_copy(update={"details": details_of_weights(manifest.details)})
        record = variant_record(name, backend, manifest, seconds, self.notes, self.overlap)
        return record.model_copy(update={"role": "part"}) if self.part_of else record

    @property
    def warnings(self) -> list[str]:
        """A sentence on what its configuration rounds and qeval does not, if there is any such thing."""
        if self.folder is None or self.scheme is not None:
            return []
        limits = read_manifest(self.folder).details.get(NOT_ROUNDED)
        return [f"{self.name}: its own configuration rounds more than is rounded here ({limits})."] if limits else []


def variant_key(recipe: Recipe, loaded: BaselineModel, calibration: Calibration, seed: int) -> str:
    """Return the identity of the integers that `recipe` gives; the configuration matters where activations are seen."""
    inputs: list[Any] | None = None
    if recipe.quant_method.rounding == "sequential":
        inputs = [loaded.config_sha256, calibration.record["tokens_sha256"]]
    elif recipe.calibrated:
        inputs = [
            loaded.config_sha256,
            calibration.record["tokens_sha256"],
            seed,
            SKETCH_ROWS,
            SENSITIVITY_SAMPLES,
            SENSITIVITY_LENGTH,
            EVERY,
        ]
    # models of routers alone keep the keys that they had before the other kinds were left in float
    kinds = {"float kinds": FLOAT_KINDS_VERSION} if {*loaded.description.float_kinds.values()} - {"router"} else {}
    experts = {"experts": "all tokens"} if recipe.calibrated and calibration.all_experts else {}
    turned: dict[str, Any] = {}
    if recipe.rotations:
        turned = {"rotations": ROTATIONS_VERSION, "config": loaded.config_sha256}
    tool = {"tool": tool_version(recipe.method)} if recipe.quant_method.rounding == "external" else {}
    labels = {"labels": FISHER_VERSION} if recipe.quant_method.mixes and recipe.importance == "fisher" else {}
    return digest(
        {
            **tool,
            **labels,
            **turned,
            **experts,
            **kinds,
            **loaded.arithmetic,
            "quantizers": QUANTIZERS_VERSION,
            "recipe": recipe.identity(),
            "weights": loaded.weights_sha256,
            "calibration": inputs,
        }
    )


def _calibration_record(calibration: Calibration) -> dict[str, Any]:
    """Return what a manifest says of the calibration text, with what later runs may look for in theirs."""
    return {**calibration.record, "fingerprint": Fingerprint.of(calibration.samples).model_dump()}


def _ignore(_: int) -> None:
    """Show no progress of work that is done at once."""


class Workshop:
    """Makes the variants that the cache doesn't hold; calibrates at most once, and only if one needs it."""

    def __init__(
        self, loaded: BaselineModel, calibration: Callable[[], Calibration], seed: int, progress: Progress
    ) -> None:
        """`calibration` is called when the first calibrated recipe is met."""
        self._loaded, self._calibration, self._seed, self._progress = loaded, calibration, seed, progress
        self._sources: dict[tuple[bool, bool], Source] = {}
        self._device = loaded.device

    def entry(self, recipe: Recipe) -> VariantEntry:
        """Return the variant of a recipe, made if need be; where memory lacks, others' statistics make room.

        A failure is told, not raised.

        Raises:
            UsageError: the recipe can't be applied to this model.
        """
        try:
            folder = with_room_made(partial(self.folder, recipe), self.close)
            if warning := coverage_warning(recipe.name, read_manifest(folder)):
                self._progress.warn(warning)
            return VariantEntry(recipe.name, recipe.method, folder)
        except UsageError:
            raise
        except (QevalError, RuntimeError) as error:  # torch tells of lacking memory by a RuntimeError
            reason = reason_of(error, f"making {recipe.name}", self._device)
        release_cached()
        self._progress.warn(f"{recipe.name} failed: {reason}")
        return VariantEntry(recipe.name, recipe.method, None, reason)

    def folder(self, recipe: Recipe) -> Path:
        """Return where the variant of `recipe` lies in the cache; one process at a time makes it."""
        folder = home() / "variants" / self.key(recipe)
        with alone(f"variant-{folder.name}", self._progress.tell):
            if not self._is_whole(folder):
                self.write(recipe, folder)
        return folder

    def close(self) -> None:
        """Let go of what calibrating left."""
        self._sources.clear()

    def write(self, recipe: Recipe, folder: Path) -> None:
        """Make the variant of `recipe` and save it to `folder`."""
        variant, seconds = self.make(recipe)
        save_variant(variant, folder, self.origin(recipe, seconds))

    def key(self, recipe: Recipe) -> str:
        """Return the identity of the recipe's variant."""
        calibration = self._calibration() if recipe.calibrated else Calibration((), {})
        return variant_key(recipe, self._loaded, calibration, self._seed)

    def make(self, recipe: Recipe) -> tuple[Variant, float]:
        """Return the variant, and the seconds that it took beyond calibrating."""
        if recipe.scheme.formats:
            return self._make_with_scheme(recipe)
        if recipe.rotations:
            return self._make_rotated(recipe, recipe.rotations)
        source = self._source(recipe.calibrated, recipe.needs_statistics)
        start = time.perf_counter()
        grids, plan = self.outline(source, recipe)
        with self._quantizing(recipe, plan) as advance:
            variant = quantize_plan(source, recipe, grids, plan, advance)
        return variant, time.perf_counter() - start

    def _make_with_scheme(self, recipe: Recipe) -> tuple[Variant, float]:
        """Return the variant of a recipe's weights alone, which the cache holds or gets, with the recipe's scheme."""
        loaded, samples = self._loaded, self._calibration().samples if recipe.scheme.is_static else ()
        if recipe.quant_method.rounding == "none":
            _, weights = plan_variant(self._source(False, False), recipe, self.key(recipe), _ignore)
            seconds = 0.0
        else:
            folder = self.folder(recipe.weights_alone)
            weights, seconds = load_variant(folder), read_manifest(folder).seconds
        start, units = time.perf_counter(), sum(len(sample) for sample in samples)
        phase = self._progress.phase(f"calibrate {recipe.name}", units) if units else nullcontext(_ignore)
        with phase as advance:
            variant = with_scheme(weights, recipe, loaded.model, loaded.description, samples, advance)
        return replace(variant, key=self.key(recipe)), seconds + time.perf_counter() - start

    def _make_rotated(self, recipe: Recipe, places: RotationPlaces) -> tuple[Variant, float]:
        """Return the variant of a recipe for the weights of the rotated model, whose inputs are other ones too."""
        loaded, start = self._loaded, time.perf_counter()
        with rotated_model(loaded.model, loaded.description, loaded.head, places) as turned:
            source = self._make_source(
                recipe.calibrated, recipe.needs_statistics, description=turned.description, head=turned.head
            )
            grids, plan = self.outline(source, recipe)
            with self._quantizing(recipe, plan) as advance:
                variant = quantize_plan(source, recipe, grids, plan, advance)
            return turned.completed(variant), time.perf_counter() - start

    def outline(self, source: Source, recipe: Recipe) -> tuple[dict[str, WeightGrid], Variant]:
        """Plan a variant; where groups are tried for it, that is a phase of its own, and what they came to is kept."""
        units = trial_units(self._loaded.description, recipe)
        source = self.remembering(source, recipe) if units else source
        with self._progress.phase(f"try groups for {recipe.name}", units) if units else nullcontext(_ignore) as advance:
            return plan_variant(source, recipe, self.key(recipe), advance)

    def remembering(self, source: Source, recipe: Recipe) -> Source:
        """Return the source with trials that know what the groups of a mix came to, or else keep it."""
        path = home() / "trials" / f"{self.key(replace(recipe, budget=None, high=None, formats=()))}.json"
        passes = trial_passes(self._loaded.description)
        return replace(source, trials=Remembered(source.trials, path, passes, self._progress.warn))

    def _quantizing(self, recipe: Recipe, plan: Variant) -> AbstractContextManager[Advance]:
        return self._progress.phase(f"quantize {recipe.name}", rounding_units(recipe, plan))

    def calibrated_source(self, recipe: Recipe) -> Source:
        """Return the model with its calibration samples, and the statistics that `recipe` needs."""
        return self._source(True, recipe.needs_statistics)

    def origin(self, recipe: Recipe, seconds: float) -> Origin:
        """Return what the manifest says of where the variant came from."""
        return Origin(
            recipe=recipe.identity() | {"rules": [vars(rule) for rule in recipe.rules]},
            model={"name": self._loaded.name, "weights_sha256": self._loaded.weights_sha256},
            calibration=_calibration_record(self._calibration()) if recipe.calibrated else None,
            float_bits=self._loaded.float_bits,
            seconds=seconds,
        )

    def _source(self, calibrated: bool, uses_statistics: bool) -> Source:
        if (calibrated, uses_statistics) not in self._sources:
            loaded = self._loaded
            self._sources[calibrated, uses_statistics] = self._make_source(
                calibrated, uses_statistics, description=loaded.description, head=loaded.head
            )
        return self._sources[calibrated, uses_statistics]

    def _make_source(self, calibrated: bool, uses_statistics: bool, *, description: Description, head: Head) -> Source:
        """Return the model as its weights are now, of a structure and with a head, with what a recipe needs."""
        model = self._loaded.model
        text = self._calibration() if calibrated else Calibration((), {})
        samples: Sequence[Sequence[int]] = text.samples
        statistics: Mapping[str, Any] = {}
        if uses_statistics:
            with self._progress.phase("calibrate", sum(len(sample) for sample in samples)) as advance:
                statistics = collect(model, description, samples, self._seed, advance, all_experts=text.all_experts)
        return source_of(
            model, description, head, samples, statistics, self._loaded.float_bits, all_experts=text.all_experts
        )

    def _is_whole(self, folder: Path) -> bool:
        if not folder.exists():
            return False
        try:
            verify_variant(folder)
        except (BrokenRecordError, UsageError) as error:
            self._progress.warn(f"{error} It is made again.")
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True


FitsKernel = Callable[[str, WeightGrid, int], object]
"""Raises a UsageError unless a backend's kernel takes a grid: the weight's name, the grid, the row's width."""


def any_grid(name: str, grid: WeightGrid, columns: int) -> None:
    """Torch computes with any grid."""


def check_recipes(recipes: Sequence[Recipe], loaded: BaselineModel, samples: int, fits: FitsKernel = any_grid) -> None:
    """Refuse recipes that no variant of this model can be made from, or no kernel takes, before any work starts.

    `samples`: how many calibration sequences there will be.

    Raises:
        UsageError: it names the recipe.
    """
    if recipes and not quantizable(loaded.description):
        raise UsageError("This model has no linear layers that could be quantized.")
    source = source_of(loaded.model, loaded.description, loaded.head, (), {}, loaded.float_bits)
    rotated: set[RotationPlaces] = set()
    for recipe in recipes:
        try:
            if recipe.rotations and recipe.rotations not in rotated:
                loaded.check_rotation(recipe.rotations)
                rotated.add(recipe.rotations)
            check_samples(recipe, samples)
            if recipe.scheme:
                check_scheme(recipe.scheme, loaded.model, loaded.description, loaded.head_shapes)
            possible = possible_grids(source, recipe)
            for name, grid in ((name, grid) for name, grids in possible.items() for grid in grids):
                fits(name, grid, source.search.parameters[name].shape[1])
        except UsageError as error:
            named = f"'{recipe.name}'" in str(error)
            raise UsageError(str(error) if named else f"'{recipe.name}': {error}") from error
