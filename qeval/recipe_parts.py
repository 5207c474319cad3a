"""The parts of a recipe, each as a recipe of its own: its weights alone, its activations, its keys, its values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qeval.config import Defaults, Recipe, parse_method, recipe_from
from qeval.errors import UsageError

_WEIGHTS = "weights"
_FLOAT_WEIGHTS = "fp16"


def split_recipe(recipe: Recipe) -> dict[str, Recipe]:
    """Return what a recipe rounds, each part alone; nothing of a recipe that rounds one thing.

    Activations are not told apart where the method folds scales into the weights, where the model is rotated, or where
    rules leave some of them in float: alone, on float weights, they would be others. So would values that are rotated.
    """
    method, rotations = recipe.quant_method, recipe.rotations
    scheme = {part: str(how) for part, how in recipe.scheme.formats.items()}
    rounds_weights = method.rounding != "none"
    if len(scheme) + rounds_weights < 2:
        return {}
    changes_inputs = method.scales_inputs or method.rounding in ("smoothed", "external") or rotations is not None
    changed = {"activations"} if changes_inputs or recipe.rules else set()
    changed |= {"values"} if rotations is not None and rotations.heads else set()
    parts = {_WEIGHTS: _weights_alone(recipe)} if rounds_weights else {}
    for part, text in scheme.items():
        if part not in changed:
            parts[part] = recipe_from(f"{_FLOAT_WEIGHTS}+{part[0]}-{text}", Defaults(), {})
    return parts


def added_parts(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Return the parts of `recipes` that are not among them, each once.

    Raises:
        UsageError: No recipe has more than one part.
    """
    parts = [part for recipe in recipes for part in split_recipe(recipe).values()]
    if not parts:
        raise UsageError(
            "--split scores the parts of a recipe alone, and no recipe here rounds more than one of weights, "
            "activations, keys and values; name one that does, such as int8-w8a8 or awq+kv-int8, or leave --split out."
        )
    added: list[Recipe] = []
    for part in parts:
        if _same(part, (*recipes, *added)) is None:
            added.append(part)
    return tuple(added)


def names_of_parts(recipe: Recipe, scored: Iterable[Recipe]) -> Mapping[str, str]:
    """Return by part the name under which it is scored alone; parts that are not scored are left out."""
    found = {part: _same(alone, scored) for part, alone in split_recipe(recipe).items()}
    return {part: name for part, name in found.items() if name is not None}


def _same(recipe: Recipe, others: Iterable[Recipe]) -> str | None:
    """Return the name of the recipe among `others` that gives the same variant."""
    identity = recipe.identity()
    return next((each.name for each in others if each.identity() == identity), None)


def _weights_alone(recipe: Recipe) -> Recipe:
    """Return the recipe of the weights under the shortest name that means it."""
    alone = recipe.weights_alone
    rotated = f"+{recipe.rotation}" if recipe.rotation else ""
    for name in (recipe.name.partition("+")[0], alone.name, f"{recipe.method}:{recipe.grid}{rotated}"):
        if _means(name, alone):
            return replace(alone, name=name)
    return replace(alone, name=f"{recipe.name} (weights)")


def _means(name: str, recipe: Recipe) -> bool:
    try:
        return parse_method(name).identity() == recipe.identity()
    except UsageError:
        return False
