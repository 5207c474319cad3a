"""The recipes that treat a finding: what changes of the recipe whose loss was looked into, and how it is called."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from math import ceil
from typing import Any, NamedTuple

from qeval.config import GridRule, Recipe
from qeval.errors import UsageError
from qeval.jobs.loss_causes import LossCauses
from qeval.models.structure.graph import Group
from qeval.quantize.build import assign_grids
from qeval.quantize.context import Source
from qeval.report.advice import Finding, FindingKind

MOST_TREATMENTS = 3
_HIGH = "int8-channel"
_OWN_FIELDS: Mapping[str, Any] = {"damping": None, "act_order": None, "alpha": None, "fold_only": False}
"""Fields that belong to one method alone; another one's recipe has them at their defaults."""

Check = Callable[[Recipe], None]
"""Raises a UsageError unless the model can be made so."""


class _Change(NamedTuple):
    """Other fields of a recipe, and what of them no name can say."""

    fields: Mapping[str, Any]
    note: str = ""


_Treat = Callable[[Source, Recipe, Group | None], Sequence[_Change]]
"""Returns the treatments of a finding about a group (None: about no one group), the best first."""


def propose(source: Source, recipe: Recipe, causes: LossCauses, check: Check) -> list[tuple[FindingKind, Recipe]]:
    """Return at most three recipes that treat the findings: the first treatment of each, then the second ones.

    Args:
        source: The model.
        recipe: What the findings are about.
        causes: The findings, the one with the largest share of the loss first.
        check: Refuses recipes that this model can't be made by; these are left out.
    """
    by_finding = [list(_possible(source, recipe, each, causes, check)) for each in causes.findings]
    chosen: list[tuple[FindingKind, Recipe]] = []
    for turn in zip_longest(*by_finding):
        for finding, treated in zip(causes.findings, turn, strict=True):
            if treated is not None and all(treated.identity() != each.identity() for _, each in chosen):
                chosen.append((finding.kind, treated))
    return chosen[:MOST_TREATMENTS]


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as an entry of a YAML file that `--config` reads: the fields that are not their defaults."""
    entry: dict[str, Any] = {}
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        if field.name in ("name", "method") or value != field.default:
            entry[field.name] = [vars(rule) for rule in value] if field.name == "rules" else value
    return {name: value for name, value in entry.items() if value != []}


def _possible(source: Source, recipe: Recipe, finding: Finding, causes: LossCauses, check: Check) -> Iterator[Recipe]:
    """Yield the treatments of a finding that the model can be made by and that change anything."""
    for treated in _TREATMENTS[finding.kind](source, recipe, causes.groups.get(finding.kind)):
        try:
            changed = replace(recipe, **treated.fields)
            named = replace(changed, name=_name(changed, treated.note))
            check(named)
        except UsageError:
            continue
        if named.identity() != recipe.identity():
            yield named


def _for_activations(source: Source, recipe: Recipe, group: Group | None) -> list[_Change]:
    """Move outliers into the weights where those have 8 bits to take them, else spread them by a rotation first."""
    places = ("r1r2r4", "r1r2", "r1") if group is not None and group.kind == "down" else ("r1r2", "r1")
    smooth = _Change({**_OWN_FIELDS, "method": "smoothquant", "clip": None})
    turned = [_Change({"rotation": place}) for place in places]
    return [smooth, *turned] if recipe.low_grid.bits >= 8 else [*turned, smooth]


def _for_columns(source: Source, recipe: Recipe, group: Group | None) -> list[_Change]:
    return [_Change({**_OWN_FIELDS, "method": "awq", "clip": None})]


def _for_keys(source: Source, recipe: Recipe, group: Group | None) -> list[_Change]:
    return _for_cache(recipe, "keys")


def _for_values(source: Source, recipe: Recipe, group: Group | None) -> list[_Change]:
    return _for_cache(recipe, "values")


def _for_cache(recipe: Recipe, part: str) -> list[_Change]:
    """Give each channel a scale of its own where the format takes that, or rotate heads."""
    how = recipe.scheme.formats[part]
    by_channel = str(replace(how, span="channel", size=0)) if how.kind.startswith(("int", "fp8")) else None
    formats = [by_channel, str(replace(how, hadamard=True))]
    return [_Change({part: each}) for each in formats if each is not None]


def _for_head(source: Source, recipe: Recipe, group: Group | None) -> list[_Change]:
    rule = GridRule(source.description.head, _HIGH)
    return [_Change({"quantize_head": True, "rules": (rule, *recipe.rules)}, f"head {_HIGH}")]


def _for_group(source: Source, recipe: Recipe, group: Group | None) -> list[_Change]:
    """Mix under the size at which this group has 8 bits; by a rule where the method mixes nothing."""
    assert group is not None
    rules = *(GridRule(name, _HIGH) for name in group.names), *recipe.rules
    by_rule = _Change({"rules": rules}, f"layer {group.layer} {group.kind} {_HIGH}")
    mixed = recipe.quant_method.mixed
    if not mixed:
        return [by_rule]
    return [_Change({"method": mixed, "budget": _budget(source, recipe, group)}), by_rule]


def _budget(source: Source, recipe: Recipe, group: Group) -> float:
    """Return the bits per weight, in hundredths rounded up, of a recipe with one group at 8 bits."""
    parameters, grids = source.search.parameters, assign_grids(source, recipe)[0]
    bits = 0.0
    for name, grid in grids.items():
        widened = max(8, grid.bits) / grid.bits if name in group.names else 1.0
        bits += grid.size_bits(*parameters[name].shape) * widened
    return ceil(100 * bits / sum(parameters[name].numel() for name in grids)) / 100


_TREATMENTS: Mapping[FindingKind, _Treat] = {
    "activation outliers": _for_activations,
    "salient columns": _for_columns,
    "key outliers": _for_keys,
    "value outliers": _for_values,
    "sensitive head": _for_head,
    "sensitive group": _for_group,
}


def _name(recipe: Recipe, note: str) -> str:
    """Return the name that means a recipe, with a note where no name says all of it."""
    words = [recipe.grid] if recipe.quant_method.rounding != "none" else []
    words += [] if recipe.clip is None else ["clip" if recipe.clip else "noclip"]
    words += ["fold"] * recipe.fold_only + ["noactorder"] * (recipe.act_order is False)
    words += [] if recipe.damping is None else [f"damp{recipe.damping:g}"]
    words += [] if recipe.alpha is None else [f"alpha{recipe.alpha:g}"]
    words += [] if recipe.budget is None else [f"{recipe.budget:g}bpw"]
    words += ["head"] * recipe.quantize_head
    parts = [f"{part[0]}-{how}" for part, how in recipe.scheme.formats.items()]
    parts += [recipe.rotation] if recipe.rotation else []
    method = "fp16" if recipe.quant_method.rounding == "none" else recipe.method
    name = "+".join([f"{method}:{'-'.join(words)}" if words else method, *parts])
    return f"{name} ({note})" if note else name
