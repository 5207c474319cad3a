"""`quantize`: one variant, written where the user says."""

from contextlib import closing
from functools import cache
from pathlib import Path

import torch

from qeval.compare.loading import loaded_model, tell_warnings
from qeval.compare.plan import calibration_of
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.compare.variants import check_recipes
from qeval.config import Recipe
from qeval.progress import Progress
from qeval.recipe_checks import check_streamed
from qeval.store.variants import Manifest, check_free, read_manifest


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
    """Quantize `model` by `recipe` and write the variant to `folder`; its manifest is returned.

    Raises:
        UsageError: the folder is taken, or the model can't be loaded, streamed or quantized so.
    """
    check_free(folder)
    if model.stream:
        check_streamed([recipe])
    if threads:
        torch.set_num_threads(threads)
    loaded, source, _ = loaded_model(model, folds=recipe.quant_method.scales_inputs or recipe.rotations is not None)
    tell_warnings(loaded, progress)
    check_recipes([recipe], source, calibration.samples)
    text = cache(lambda: calibration_of(calibration, loaded))
    with closing(source.workshop(text, seed, progress)) as workshop:
        workshop.write(recipe, folder)
    return read_manifest(folder)
