"""`quantize`: one variant, written where the user says."""

from pathlib import Path

import torch

from qeval.compare.prepare import calibration_of, source_of_model
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.compare.variants import Workshop, check_recipes
from qeval.config import Recipe
from qeval.progress import Progress
from qeval.store.variants import Manifest, check_free, read_manifest, save_variant


def make_variant(
    model: ModelChoice,
    recipe: Recipe,
    calibration: CalibrationChoice,
    folder: Path,
    *,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> Manifest:
    """Quantize `model` by `recipe` and write the variant to `folder`; its manifest is returned."""
    check_free(folder)
    if threads:
        torch.set_num_threads(threads)
    loaded, source = source_of_model(model)
    check_recipes([recipe], source)
    workshop = Workshop(source, lambda: calibration_of(calibration, loaded), seed, progress)
    variant, seconds = workshop.make(recipe)
    save_variant(variant, folder, workshop.origin(recipe, seconds))
    return read_manifest(folder)
