"""The recipes that a streamed model can be quantized by."""

from collections.abc import Sequence

from qeval.config import Recipe
from qeval.errors import UsageError


def check_streamed(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes that a streamed model can't be quantized by.

    Raises:
        UsageError: Another tool quantizes, inputs are turned (R4), or the model is smoothed first.
    """
    if turned := [recipe.name for recipe in recipes if recipe.rotations and recipe.rotations.online]:
        raise UsageError(f"{', '.join(turned)}: qeval makes R4 of models that are in memory; leave r4 or --stream out.")
    if smoothed := [recipe.name for recipe in recipes if recipe.quant_method.rounding == "smoothed"]:
        raise UsageError(f"{', '.join(smoothed)}: qeval smooths models that are in memory; leave it or --stream out.")
    if tools := [recipe.name for recipe in recipes if recipe.quant_method.rounding == "external"]:
        raise UsageError(
            f"{', '.join(tools)}: other tools quantize models that are in memory; leave them or --stream out."
        )
