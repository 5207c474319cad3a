"""Checks of a recipe's fields against each other: what its method can't take is refused when it is built."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from qeval.errors import UsageError
from qeval.quant.candidates import candidate_formats
from qeval.quant.grid import FLOAT_WORDS, SymmetricRange

if TYPE_CHECKING:
    from qeval.config import Recipe

UNNAMED_GRID = "int4-g128"
"""The grid of a recipe that names none."""
_SPANS = frozenset(get_args(SymmetricRange))


def refuse_impossible(recipe: "Recipe") -> None:
    """Refuse a recipe that no variant can be made from; its method is one of `METHODS`.

    Raises:
        UsageError: It says what of it does not go with the rest.
    """
    method = recipe.quant_method
    if recipe.formats:
        _check_formats(recipe)
    if not method.mixes and (recipe.budget is not None or recipe.high is not None):
        raise UsageError(f"'{recipe.name}': a budget or a high grid belongs to mixed methods, not to {recipe.method}.")
    if method.rounding != "sequential" and (recipe.damping is not None or recipe.act_order is not None):
        raise UsageError(f"'{recipe.name}': damping and act-order belong to gptq, not to {recipe.method}.")
    if recipe.algorithm is not None and recipe.algorithm not in method.algorithms:
        raise UsageError(f"'{recipe.name}': {recipe.method} has no algorithm '{recipe.algorithm}'.")
    if method.rounding == "external" and (recipe.clip is not None or recipe.quantize_head):
        raise UsageError(f"'{recipe.name}': clip, noclip and the head belong to qeval's own methods.")
    if recipe.damping is not None and not 0 < recipe.damping <= 1:
        raise UsageError(f"'{recipe.name}': damping is a share above 0 and at most 1, not {recipe.damping:g}.")
    if recipe.fold_only and not method.scales_inputs:
        raise UsageError(f"'{recipe.name}': fold belongs to awq and mixed, which scale inputs, not to {recipe.method}.")
    _check_rotation(recipe)
    _check_scheme(recipe)
    if method.rounding == "smoothed" and recipe.clip:
        raise UsageError(f"'{recipe.name}': {recipe.method} searches no clip range.")
    if recipe.alpha is not None and (method.rounding != "smoothed" or not 0 <= recipe.alpha <= 1):
        raise UsageError(f"'{recipe.name}': alpha belongs to smoothquant, and lies between 0 and 1.")
    _check_grids(recipe)


def _check_scheme(recipe: "Recipe") -> None:
    """Refuse formats that mean nothing, and a recipe that rounds nothing."""
    scheme = recipe.scheme
    if recipe.quant_method.rounding != "none":
        return
    if not scheme:
        raise UsageError(f"'{recipe.name}' rounds nothing; name what it rounds, for example {recipe.method}+kv-int8.")
    if recipe.quantize_head or recipe.rules:
        raise UsageError(f"'{recipe.name}': rules and the head go with quantized weights.")


def _check_rotation(recipe: "Recipe") -> None:
    """Refuse places that mean nothing, and rotations of what qeval does not round itrecipe."""
    if recipe.rotations is None:
        return
    rounding = recipe.quant_method.rounding
    if rounding == "external":
        raise UsageError(f"'{recipe.name}': {recipe.method} takes models as they are; leave the rotation out.")
    if rounding == "none":
        raise UsageError(f"'{recipe.name}': rotations go with quantized weights; alone they change nothing.")


def _check_formats(recipe: "Recipe") -> None:
    """Refuse formats that leave nothing to choose, or come where something else says what a group may get."""
    if not recipe.quant_method.mixes:
        raise UsageError(
            f"'{recipe.name}': several formats to choose among belong to mixed methods, not to {recipe.method}; "
            f"name one, or take {recipe.quant_method.mixed or 'mixed'}."
        )
    if recipe.grid != UNNAMED_GRID or recipe.high is not None:
        raise UsageError(
            f"'{recipe.name}': the formats name all that a group may get; leave the grid ({recipe.grid}) and the high "
            "one out, or add them to the formats."
        )
    if recipe.importance == "positional":
        raise UsageError(
            f"'{recipe.name}': the positional rule knows INT4 and INT8 alone; take --importance measured or fisher "
            "with a --budget."
        )
    candidate_formats(recipe.name, recipe.formats)


def _check_grids(recipe: "Recipe") -> None:
    """Refuse grids that the method can't take."""
    if recipe.formats:
        return
    method = recipe.quant_method
    for text in (recipe.grid, recipe.high or "", *(rule.grid for rule in recipe.rules)):
        if not set(FLOAT_WORDS).isdisjoint(text.split("-")) and (method.mixes or method.rounding == "external"):
            does = "mixes widths of integers" if method.mixes else "is asked for integers alone"
            several = f", or several formats (mixed:int4/{text}-6bpw)" if method.mixes else ""
            raise UsageError(
                f"'{recipe.name}': {recipe.method} {does}, not {text}; take rtn, awq or gptq, such as "
                f"awq:nvfp4{several}."
            )
        if method.rounding == "external" and not _SPANS.isdisjoint(text.split("-")):
            raise UsageError(
                f"'{recipe.name}': {recipe.method} spans its range in a way of its own; leave {text} out, "
                "or take rtn, awq, gptq or mixed."
            )


def check_streamed(recipes: Sequence["Recipe"]) -> None:
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
