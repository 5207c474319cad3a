"""The variants of a run: made once, kept in the cache under what they were made from, read back when scored."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qeval.calibrate.build import carried_out, check, outline, quantizable, rounding_units, source_of
from qeval.calibrate.mix import check_samples, trial_units
from qeval.calibrate.sensitivity import EVERY, LENGTH, SAMPLES, trial_passes
from qeval.calibrate.source import Source
from qeval.calibrate.stream import collect
from qeval.calibrate.tools.registry import tool_version
from qeval.compare.trials import Remembered
from qeval.config import Recipe
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.identity import digest
from qeval.models.graph import Description
from qeval.models.head import Head
from qeval.paths import home
from qeval.progress import Advance, Progress
from qeval.quant.grid import Grid, parse
from qeval.quant.statistics import SKETCH_ROWS
from qeval.quant.variant import Variant
from qeval.store.locks import alone
from qeval.store.run import OverlapRecord
from qeval.store.variants import MANIFEST, Origin, save_variant, verify_variant
from qeval.tasks.overlap import Fingerprint

QUANTIZERS_VERSION = 3
"""Part of every variant's key: raise it when the same recipe gives other integers."""


@dataclass(frozen=True)
class Calibration:
    """The calibration text as token ids, and what a record says of it."""

    samples: tuple[tuple[int, ...], ...]
    record: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Loaded:
    """The model that variants are made from."""

    model: Any
    description: Description
    head: Head
    weights_sha256: str
    config_sha256: str
    name: str
    weight_dtype: torch.dtype

    @property
    def float_bits(self) -> int:
        """Bits of a weight in the checkpoint."""
        return self.weight_dtype.itemsize * 8


@dataclass(frozen=True)
class Entry:
    """One variant of a run: where it lies, or why it failed."""

    name: str
    method: str
    folder: Path | None
    error: str | None = None
    told: Mapping[str, str] = field(default_factory=dict)
    """What a reader must know of it in this run, beside what its manifest says."""
    overlap: OverlapRecord | None = None
    """What the text that it was calibrated on before this run shares with what is scored; None: that is not known."""


def variant_key(recipe: Recipe, loaded: Loaded, calibration: Calibration, seed: int) -> str:
    """The identity of the integers that `recipe` gives; the configuration matters where activations are seen."""
    seen: list[Any] | None = None
    if recipe.uses_gptq:
        seen = [loaded.config_sha256, calibration.record["tokens_sha256"]]
    elif recipe.calibrated:
        seen = [loaded.config_sha256, calibration.record["tokens_sha256"], seed, SKETCH_ROWS, SAMPLES, LENGTH, EVERY]
    tool = {"tool": tool_version(recipe.method)} if recipe.tool else {}
    return digest(
        {
            **tool,
            "quantizers": QUANTIZERS_VERSION,
            "recipe": recipe.identity(),
            "weights": loaded.weights_sha256,
            "calibration": seen,
        }
    )


def _told(seen: Calibration) -> dict[str, Any]:
    """What a manifest says of the calibration text, with what later runs may look for in theirs."""
    return {**seen.record, "fingerprint": Fingerprint.of(seen.samples).model_dump()}


def _nobody(_: int) -> None:
    """Nothing is told of work that is done at once."""


class Workshop:
    """Makes the variants that the cache doesn't hold; calibrates at most once, and only if one needs it."""

    def __init__(self, loaded: Loaded, calibration: Callable[[], Calibration], seed: int, progress: Progress) -> None:
        """`calibration` is called when the first calibrated recipe is met."""
        self._loaded, self._calibration, self._seed, self._progress = loaded, calibration, seed, progress
        self._sources: dict[tuple[bool, bool], Source] = {}

    def entry(self, recipe: Recipe) -> Entry:
        """The variant of a recipe, made if need be. A failure while making it is told, not raised.

        Raises:
            UsageError: the recipe can't be applied to this model.
        """
        try:
            return Entry(recipe.name, recipe.method, self.folder(recipe))
        except UsageError:
            raise
        except QevalError as error:
            self._progress.warn(f"{recipe.name} failed: {error}")
            return Entry(recipe.name, recipe.method, None, str(error))

    def folder(self, recipe: Recipe) -> Path:
        """Where the variant of `recipe` lies in the cache; one process at a time makes it."""
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
        """The identity of the recipe's variant."""
        calibration = self._calibration() if recipe.calibrated else Calibration((), {})
        return variant_key(recipe, self._loaded, calibration, self._seed)

    def make(self, recipe: Recipe) -> tuple[Variant, float]:
        """The variant, and the seconds that it took beyond calibrating."""
        source = self._source(recipe.calibrated, recipe.uses_statistics)
        start = time.perf_counter()
        grids, plan = self._outline(source, recipe)
        with self._quantizing(recipe, plan) as advance:
            variant = carried_out(source, recipe, grids, plan, advance)
        return variant, time.perf_counter() - start

    def _outline(self, source: Source, recipe: Recipe) -> tuple[dict[str, Grid], Variant]:
        """As `outline`; where groups are tried for it, that is a phase of its own, and what they came to is kept."""
        units = trial_units(self._loaded.description, recipe)
        if units:
            kept = home() / "trials" / f"{self.key(replace(recipe, budget=None, high=None))}.json"
            passes = trial_passes(self._loaded.description)
            source = replace(source, trials=Remembered(source.trials, kept, passes, self._progress.warn))
        with self._progress.phase(f"try groups for {recipe.name}", units) if units else nullcontext(_nobody) as advance:
            return outline(source, recipe, self.key(recipe), advance)

    def _quantizing(self, recipe: Recipe, plan: Variant) -> AbstractContextManager[Advance]:
        return self._progress.phase(f"quantize {recipe.name}", rounding_units(recipe, plan))

    def calibrated_source(self, recipe: Recipe) -> Source:
        """The model with its calibration samples, and the statistics that `recipe` needs."""
        return self._source(True, recipe.uses_statistics)

    def origin(self, recipe: Recipe, seconds: float) -> Origin:
        """What the manifest says of where the variant came from."""
        return Origin(
            recipe=recipe.identity() | {"rules": [vars(rule) for rule in recipe.rules]},
            model={"name": self._loaded.name, "weights_sha256": self._loaded.weights_sha256},
            calibration=_told(self._calibration()) if recipe.calibrated else None,
            float_bits=self._loaded.float_bits,
            seconds=seconds,
        )

    def _source(self, calibrated: bool, uses_statistics: bool) -> Source:
        if (calibrated, uses_statistics) not in self._sources:
            self._sources[calibrated, uses_statistics] = self._make_source(calibrated, uses_statistics)
        return self._sources[calibrated, uses_statistics]

    def _make_source(self, calibrated: bool, uses_statistics: bool) -> Source:
        loaded = self._loaded
        samples: Sequence[Sequence[int]] = self._calibration().samples if calibrated else ()
        statistics: Mapping[str, Any] = {}
        if uses_statistics:
            with self._progress.phase("calibrate", sum(len(sample) for sample in samples)) as advance:
                statistics = collect(loaded.model, loaded.description, samples, self._seed, advance)
        return source_of(loaded.model, loaded.description, loaded.head, samples, statistics)

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


FitsKernel = Callable[[str, Grid, int], object]
"""Raises a UsageError unless a backend's kernel takes a grid: the weight's name, the grid, the row's width."""


def _any_grid(name: str, grid: Grid, columns: int) -> None:
    """Torch computes with any grid."""


def is_variant(folder: Path) -> bool:
    """Whether a folder holds a variant of qeval's, and not some other model."""
    return (folder / MANIFEST).exists()


def given_entry(name: str, folder: Path, weights_sha256: str, fits: FitsKernel = _any_grid) -> Entry:
    """A variant that `--variant NAME=FOLDER` names.

    Raises:
        UsageError: the folder holds no variant, one of another model, or one whose grids no kernel takes.
    """
    if not folder.exists():
        raise UsageError(f"--variant {name}={folder}: there is nothing there; on the hub it would be ORG/REPO.")
    manifest = verify_variant(folder)
    if manifest.model.get("weights_sha256") != weights_sha256:
        raise UsageError(
            f"--variant {name}={folder} was made from other weights ({manifest.model.get('name')}) than the "
            "baseline's, so it cannot be compared with it."
        )
    for entry in manifest.weights:
        fits(entry.name, parse(entry.grid), entry.columns)
    return Entry(name, str(manifest.recipe.get("method", "given")), folder)


def check_recipes(recipes: Sequence[Recipe], loaded: Loaded, samples: int, fits: FitsKernel = _any_grid) -> None:
    """Refuse recipes that no variant of this model can be made from, or no kernel takes, before any work starts.

    `samples`: how many calibration sequences there will be.

    Raises:
        UsageError: it names the recipe.
    """
    if recipes and not quantizable(loaded.description):
        raise UsageError("This model has no linear layers that could be quantized.")
    source = source_of(loaded.model, loaded.description, loaded.head, (), {})
    for recipe in recipes:
        try:
            check_samples(recipe, samples)
            possible = check(source, recipe)
            for name, grid in ((name, grid) for name, grids in possible.items() for grid in grids):
                fits(name, grid, source.search.parameters[name].shape[1])
        except UsageError as error:
            named = f"'{recipe.name}'" in str(error)
            raise UsageError(str(error) if named else f"'{recipe.name}': {error}") from error
