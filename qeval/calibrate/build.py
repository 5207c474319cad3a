"""A recipe and a model become a variant; every weight of the model is accounted for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qeval.calibrate.groups import (
    Parameters,
    Scaled,
    Search,
    effective,
    explicit_scales,
    folded_floats,
    quantize_groups,
    row_divisors,
)
from qeval.calibrate.sensitivity import measure
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.graph import Description, Group
from qeval.models.head import Head
from qeval.progress import Advance
from qeval.quant.grid import Grid, PerBlock, parse
from qeval.quant.mixed import Option, choose_high, positional_names
from qeval.quant.qweight import QWeight, check_fits
from qeval.quant.rtn import quantize
from qeval.quant.variant import Choice, Kept, Variant

_FLOAT = "float"
_SCALE_BITS = 32
HIGH_BITS = 8


@dataclass(frozen=True, eq=False)
class Source:
    """The model that variants are made from: its parameters (head included), structure, and calibration."""

    model: Any
    description: Description
    head: Head
    samples: Sequence[Sequence[int]]
    search: Search


def source_of(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    statistics: Mapping[str, Any],
) -> Source:
    """A source over `model`; a tied head is listed under its own name too."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    parameters.setdefault(description.head, head.weight)
    return Source(model, description, head, samples, Search(parameters, dict(statistics)))


@torch.inference_mode()
def build(source: Source, recipe: Recipe, key: str, advance: Advance) -> Variant:
    """The variant of `recipe`. `advance` is told 1 for every group whose sensitivity was measured.

    Raises:
        UsageError: a block larger than a row, a budget that no choice meets, a rule that matches nothing.
    """
    grids, kept = _assign(source, recipe, parse(recipe.grid))
    choices: tuple[Choice, ...] = ()
    if recipe.mixed:
        grids, choices = _mix(source, recipe, grids, advance)
    scales = source.search.scales(source.description.groups, grids) if recipe.uses_awq else {}
    divisors = row_divisors(scales, source.search.parameters)
    weights = quantize_groups(source.search, source.description.groups, grids, scales, divisors, clip=recipe.clips)
    if source.description.head in grids:
        weights[source.description.head] = _quantize_head(source, grids)
    return Variant(
        key=key,
        weights=weights,
        floats=folded_floats(scales, source.search.parameters, grids),
        input_scales=explicit_scales(scales),
        kept=kept,
        choices=choices,
        details=_details(recipe, scales),
    )


def outline(source: Source, recipe: Recipe, key: str) -> tuple[dict[str, Grid], Variant]:
    """The grids of a recipe that needs no calibration, and its variant without numbers: matrices on the meta device.

    Raises:
        UsageError: as `build`.
    """
    grids, kept = _assign(source, recipe, parse(recipe.grid))
    choices: tuple[Choice, ...] = ()
    if recipe.mixed:
        grids, choices = _mix(source, recipe, grids, lambda done: None)
    inside = [name for name in quantizable(source.description) if name in grids]
    names = [*inside, *([source.description.head] if source.description.head in grids else [])]
    weights = {name: _weightless(source.search.parameters[name], grids[name]) for name in names}
    return grids, Variant(key, weights, {}, {}, kept, choices, _details(recipe, {}))


def check(source: Source, recipe: Recipe) -> dict[str, tuple[Grid, ...]]:
    """Refuse what `build` would refuse, without its work: no calibration is needed.

    What each quantized weight may come out as is returned: its grid, or the two that a mixed method chooses between.

    Raises:
        UsageError: as `build`.
    """
    grids, _ = _assign(source, recipe, parse(recipe.grid))
    if not recipe.mixed:
        return {name: (grid,) for name, grid in grids.items()}
    _mixed_budget(source, recipe, grids)
    return {name: (grid, high_grid(recipe)) for name, grid in grids.items()}


def quantizable(description: Description) -> list[str]:
    """The names of all linears in decoder layers, in the order of the computation."""
    return [name for group in description.groups for name in group.names]


def positional_budget(source: Source, recipe: Recipe, grids: Mapping[str, Grid]) -> tuple[dict[str, Grid], int]:
    """The grids under the positional rule, and their size in bits."""
    high = high_grid(recipe)
    chosen = positional_names(grids, len(source.description.layers))
    mixed = {name: high if name in chosen else grid for name, grid in grids.items()}
    return mixed, _bits(mixed, source.search.parameters)


def high_grid(recipe: Recipe) -> Grid:
    """The grid of the weights that matter most: the low grid with 8 bits unless the recipe names another."""
    low = parse(recipe.grid)
    return replace(low, bits=HIGH_BITS) if recipe.high is None else parse(recipe.high, low)


def _assign(source: Source, recipe: Recipe, grid: Grid) -> tuple[dict[str, Grid], tuple[Kept, ...]]:
    """The grid of every quantized weight, and every other weight with its reason."""
    inside = set(quantizable(source.description))
    _check_rules(recipe, source.search.parameters)
    grids: dict[str, Grid] = {}
    kept = []
    for name, parameter in source.search.parameters.items():
        rule = recipe.rule_for(name)
        reason = _reason(source, recipe, name, parameter.dim(), name in inside, rule)
        if reason is not None:
            kept.append(Kept(name, parameter.numel(), reason))
            continue
        grids[name] = grid if rule is None else parse(rule, grid)
        check_fits(name, parameter.shape[1], grids[name])
    tied_head_is_float = source.description.tied and source.description.head not in grids
    kept = [k for k in kept if not (tied_head_is_float and k.name == source.description.head)]
    if not grids:
        raise UsageError(f"'{recipe.name}' leaves every weight in float; there is nothing to compare.")
    return grids, tuple(kept)


def _reason(source: Source, recipe: Recipe, name: str, dim: int, inside: bool, rule: str | None) -> str | None:
    """Why a weight stays in float, or None when it is quantized."""
    description = source.description
    if rule == _FLOAT:
        return "the recipe's rules leave it in float"
    if inside:
        return None
    if name == description.head:
        wanted = recipe.quantize_head or rule is not None
        return None if wanted else "the head stays in float unless --quantize-head"
    if name == description.embedding:
        tied = ", tied with the head" if description.tied else ""
        return f"the embedding is looked up, not multiplied{tied}"
    return "not a matrix (a norm's gain or a bias)" if dim < 2 else "not a linear layer of a decoder layer"


def _check_rules(recipe: Recipe, parameters: Parameters) -> None:
    for rule in recipe.rules:
        alone = replace(recipe, rules=(rule,))
        if not any(alone.rule_for(name) for name in parameters):
            raise UsageError(f"'{recipe.name}': the rule '{rule.match}' matches no weight of this model.")


def _mix(
    source: Source, recipe: Recipe, low: dict[str, Grid], advance: Advance
) -> tuple[dict[str, Grid], tuple[Choice, ...]]:
    budget = _mixed_budget(source, recipe, low)  # refused before the long measurement, not after
    if recipe.importance == "positional":
        grids, _ = positional_budget(source, recipe, low)
        return grids, tuple(_choice(source, group, grids, None, None) for group in _groups(source, low))
    kls = measure(
        source.model,
        source.description,
        source.head,
        source.samples,
        _effective(source, recipe, low),
        advance,
    )
    return _under_budget(source, low, {name: high_grid(recipe) for name in low}, budget, kls)


def _under_budget(
    source: Source, low: dict[str, Grid], high: dict[str, Grid], budget: int, kls: Mapping[str, float]
) -> tuple[dict[str, Grid], tuple[Choice, ...]]:
    groups, parameters = _groups(source, low), source.search.parameters
    ratios = {name: 4.0 ** -(high[name].bits - low[name].bits) for name in low}  # KL goes with the step squared
    options = [
        Option(
            _bits({n: low[n] for n in group.names if n in low}, parameters),
            _bits({n: high[n] for n in group.names if n in low}, parameters),
            kls[group.names[0]],
            kls[group.names[0]] * ratios[group.names[0]],
        )
        for group in groups
    ]
    rest = _bits(low, parameters) - sum(option.low_bits for option in options)
    picked = choose_high(options, budget - rest)
    grids = dict(low)
    for group, is_high in zip(groups, picked, strict=True):
        grids |= {name: high[name] for name in group.names if is_high and name in low}
    return grids, tuple(
        _choice(source, group, grids, option.low_kl, option.high_kl)
        for group, option in zip(groups, options, strict=True)
    )


def _mixed_budget(source: Source, recipe: Recipe, low: dict[str, Grid]) -> int:
    """The bits that may be spent on codes, scales and zero points, what AWQ's input scales may need taken off.

    Raises:
        UsageError: no choice meets the recipe's budget.
    """
    if recipe.importance == "positional" and recipe.budget is not None:
        raise UsageError(
            f"'{recipe.name}': the positional rule has its own size; leave --budget out, or take --importance measured."
        )
    if recipe.budget is None:
        return positional_budget(source, recipe, low)[1]
    high = {name: high_grid(recipe) for name in low}
    parameters = source.search.parameters
    weights = sum(parameters[name].numel() for name in low)
    reserved = _explicit_bits(source, low) if recipe.uses_awq else 0
    smallest = (_bits(low, parameters) + reserved) / weights
    largest = (_bits(high, parameters) + reserved) / weights
    if not smallest <= recipe.budget <= largest:
        side = "below the smallest" if recipe.budget < smallest else "above the largest"
        raise UsageError(
            f"'{recipe.name}': a budget of {recipe.budget:g} bits per weight is {side} possible size; "
            f"this model takes {smallest:.3f} to {largest:.3f}."
        )
    return int(recipe.budget * weights) - reserved


def _explicit_bits(source: Source, low: Mapping[str, Grid]) -> int:
    groups = [g for g in _groups(source, low) if g.fold is None or g.fold.repeat > 1]
    return sum(group.columns * len(group.names) * _SCALE_BITS for group in groups)


def _effective(source: Source, recipe: Recipe, grids: Mapping[str, Grid]) -> Callable[[Group], dict[str, torch.Tensor]]:
    search, every = source.search, source.description.groups
    scales = search.scales(every, grids) if recipe.uses_awq else {}
    divisors = row_divisors(scales, search.parameters)

    def of(group: Group) -> dict[str, torch.Tensor]:
        weights = quantize_groups(search, [group], grids, scales, divisors, clip=recipe.clips)
        scaled = scales.get(group.names[0])
        return {name: effective(name, weight, scaled, divisors) for name, weight in weights.items()}

    return of


def _groups(source: Source, grids: Mapping[str, Grid]) -> list[Group]:
    return [group for group in source.description.groups if any(name in grids for name in group.names)]


def _choice(source: Source, group: Group, grids: Mapping[str, Grid], low: float | None, high: float | None) -> Choice:
    names = tuple(name for name in group.names if name in grids)
    parameters = sum(source.search.parameters[name].numel() for name in names)
    return Choice(group.layer, group.kind, names, parameters, low, high, max(grids[n].bits for n in names))


def _bits(grids: Mapping[str, Grid], parameters: Parameters) -> int:
    return sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items())


def _quantize_head(source: Source, grids: Mapping[str, Grid]) -> QWeight:
    return quantize(source.head.weight.float(), grids[source.description.head])


def _weightless(parameter: torch.Tensor, grid: Grid) -> QWeight:
    rows, columns = parameter.shape
    shape = grid.scale_shape(rows, columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
    zeros = None if grid.symmetric else torch.empty(shape, dtype=torch.uint8, device="meta")
    return QWeight(grid, codes, torch.empty(shape, device="meta"), zeros)


def _details(recipe: Recipe, scales: Mapping[str, Scaled]) -> dict[str, str]:
    details = {"clip search": "per block" if recipe.clips else "none"}
    if recipe.uses_awq:
        explicit = sum(scaled.fold is None for scaled in scales.values())
        details["input scales"] = f"{len(scales)} groups scaled, {explicit} of them on the input explicitly"
    if recipe.quantize_head:
        details["head"] = "rounded to nearest"
    blocks = isinstance(parse(recipe.grid).granularity, PerBlock)
    details["short blocks"] = "a width that the block does not divide ends in a short block" if blocks else "none"
    return details
