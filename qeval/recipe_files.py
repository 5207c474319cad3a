"""Recipes from YAML files: lists of methods' names, or of mappings with the fields of `Recipe`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from qeval.config import PART_FIELDS, Defaults, GridRule, Importance, Recipe, parse_budget, parse_method, recipe_from
from qeval.errors import UsageError, unknown
from qeval.escape import cut
from qeval.parsing import load_yaml

_NO_FLAGS = Defaults()
_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "method": (str,),
    "grid": (str,),
    "high": (str,),
    "clip": (bool,),
    "budget": (str, int, float),
    "importance": (str,),
    "quantize_head": (bool,),
    "rules": (list,),
    "damping": (int, float),
    "act_order": (bool,),
    "algorithm": (str,),
    "alpha": (int, float),
    "fold_only": (bool,),
    "activations": (str,),
    "keys": (str,),
    "values": (str,),
    "rotation": (str,),
    "formats": (list,),
}


def load_recipes(path: Path, defaults: Defaults = _NO_FLAGS) -> list[Recipe]:
    """Load the recipes of a YAML file: a list `variants` of mappings with the fields of `Recipe`.

    Args:
        path: The file.
        defaults: Settings for recipes that have none of their own.

    Raises:
        UsageError: The file is missing, is no YAML, or has a key that no recipe has (the nearest are listed).
    """
    data = load_yaml(path)
    if not isinstance(data, Mapping):
        raise UsageError(f"{path} must hold a mapping with a list 'variants'.")
    _check_keys(data, ("variants",), f"key in {path}")
    entries = data.get("variants")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise UsageError(f"{path}: 'variants' must be a list with at least one recipe.")
    return [_recipe(entry, f"{path}, variant {index}", defaults) for index, entry in enumerate(entries, 1)]


def _recipe(entry: object, where: str, defaults: Defaults) -> Recipe:
    """Return the recipe of an entry of a file, which is a method's name or a mapping; `where` is what errors name."""
    if isinstance(entry, str):
        return parse_method(entry, defaults)
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} must be a mapping or a method's name.")
    _check_keys(entry, _TYPES, f"key in {where}")
    for key, value in entry.items():
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and bool not in _TYPES[key]):
            expected = " or ".join(kind.__name__ for kind in _TYPES[key])
            raise UsageError(f"{where}: '{key}' must be {expected}, not {cut(value)}.")

    # the name of the method may have words; the mapping's own fields come after them
    if "method" not in entry:
        raise UsageError(f"{where} names no method.")
    parts = {part: str(entry[part]) for part in PART_FIELDS if part in entry}
    recipe = recipe_from(str(entry["method"]).strip(), defaults, parts)
    fields = {key: value for key, value in entry.items() if key not in ("method", *PART_FIELDS)}
    if "importance" in fields and fields["importance"] not in get_args(Importance):
        raise unknown(f"importance in {where}", fields["importance"], get_args(Importance))
    if "budget" in fields:
        fields["budget"] = parse_budget(str(fields["budget"]), f"{where}: 'budget'")
    if "formats" in fields:
        fields["formats"] = _formats(fields["formats"], where)
    if "rules" in fields:
        fields["rules"] = tuple(_rule(rule, where) for rule in fields["rules"])
    return replace(recipe, **fields)


def _formats(entries: Sequence[object], where: str) -> tuple[str, ...]:
    """Return the names of the formats that a mix chooses among."""
    if not entries:
        raise UsageError(f"{where}: 'formats' must name at least two formats, such as int4-g128 and bf16.")
    for entry in entries:
        if not isinstance(entry, str):
            raise UsageError(f"{where}: each of 'formats' must be str, not {cut(entry)}.")
    return tuple(map(str, entries))


def _rule(entry: object, where: str) -> GridRule:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: a rule must be a mapping with 'match' and 'grid'.")
    _check_keys(entry, ("match", "grid"), f"key in a rule of {where}")
    if set(entry) != {"match", "grid"}:
        raise UsageError(f"{where}: a rule needs both 'match' and 'grid'.")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise UsageError(f"{where}: '{key}' of a rule must be str, not {cut(value)}.")
    return GridRule(entry["match"], entry["grid"])


def _check_keys(entry: Mapping[Any, Any], known: Iterable[str], kind: str) -> None:
    choices = list(known)
    for key in entry:
        if key not in choices:
            raise unknown(kind, str(key), choices)
