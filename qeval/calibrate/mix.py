"""Which groups of linears get the high bit width: ways to give out the bits, tried on the calibration text."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from qeval.calibrate import accept, fisher
from qeval.calibrate.groups import Parameters, Scales, effective, quantize_groups, row_divisors
from qeval.calibrate.sensitivity import Effective, finite, trial_passes
from qeval.calibrate.source import Source
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.graph import Description, Group
from qeval.progress import Advance
from qeval.quant.grid import Grid, parse
from qeval.quant.mixed import Option, choose_high, positional_names
from qeval.quant.variant import Choice

HIGH_BITS = 8
_SCALE_BITS = 32
_POWERS = {"proposal": 1.0, "flatter": 0.7, "steeper": 1.4}
"""Neighbours of a proposal: what it would be if the predictions' logarithms were shrunk or stretched."""
_UNIFORM = "all low"
"""Measured beside the ways to spend the budget, and never taken: it spends nothing."""


class Mix(NamedTuple):
    """The grids that the bits were given out by, what was seen of each group, and how the choice was made, in words."""

    grids: dict[str, Grid]
    choices: tuple[Choice, ...]
    details: dict[str, str]


def mix(source: Source, recipe: Recipe, low: dict[str, Grid], advance: Advance) -> Mix:
    """The grids of a mixed recipe whose weights are otherwise on the `low` ones.

    `advance` is told of what is tried, `trial_units` in all.

    Raises:
        UsageError: no choice meets the recipe's budget, or there are too few calibration samples.
    """
    budget = mixed_budget(source, recipe, low)  # refused before the long measurement, not after
    if recipe.importance == "positional":
        grids, _ = positional_budget(source, recipe, low)
        return Mix(grids, tuple(_choice(source, group, grids, None, None) for group in _units(source, low)), {})
    if recipe.importance == "measured":
        kls = finite(recipe.name, source.trials.measure(effective_of(source, recipe, low), advance))
        return Mix(*under_budget(source, recipe, low, budget, kls), {})
    check_samples(recipe, len(source.samples))
    kls = finite(recipe.name, source.trials.predict(effective_of(source, recipe, low), advance))
    ways = _ways(source, recipe, low, budget, kls)
    tried = {name: effective_of(source, recipe, grids) for name, grids in ways.items()}
    measured = finite(recipe.name, source.trials.measure_ways(tried, advance))
    best = min((name for name in ways if name != _UNIFORM), key=measured.__getitem__)
    choices = tuple(_choice(source, group, ways[best], None, None) for group in _units(source, low))
    return Mix(ways[best], choices, _accepted_details(measured, best))


def trial_units(description: Description, recipe: Recipe) -> int:
    """What `mix` tells its progress in all: nothing by position; a prediction is measured once more, as whole ways."""
    if not recipe.mixed or recipe.importance == "positional":
        return 0
    return trial_passes(description) * (2 if recipe.importance == "fisher" else 1)


def check_samples(recipe: Recipe, samples: int) -> None:
    """Refuse a recipe that so many calibration samples are too few for.

    Raises:
        UsageError: a mix that is predicted has no text left to be measured on.
    """
    needed = fisher.SAMPLES + accept.SAMPLES
    if recipe.mixed and recipe.importance == "fisher" and samples < needed:
        raise UsageError(
            f"'{recipe.name}': --importance fisher chooses on {fisher.SAMPLES} calibration samples and accepts on "
            f"{accept.SAMPLES} others; give at least {needed} --calibration-samples."
        )


def positional_budget(source: Source, recipe: Recipe, grids: Mapping[str, Grid]) -> tuple[dict[str, Grid], int]:
    """The grids under the positional rule, and their size in bits."""
    last = {unit.layer: unit.names for unit in source.description.units}
    chosen = positional_names(grids, len(source.description.layers), last)
    raised = _raised(source, recipe, grids)
    mixed = {name: raised[name] if name in chosen else grid for name, grid in grids.items()}
    return mixed, _bits(mixed, source.search.parameters)


def high_grid(recipe: Recipe) -> Grid:
    """The grid of the weights that matter most: the low grid with 8 bits unless the recipe names another."""
    low = parse(recipe.grid)
    return replace(low, bits=HIGH_BITS) if recipe.high is None else parse(recipe.high, low)


def _raised(source: Source, recipe: Recipe, low: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grids where every weight that may get the high one has it.

    Those outside the decoder layers never do, nor those that a rule of the recipe gave as many bits or more.

    Raises:
        UsageError: no weight would get more bits, so there is nothing to choose.
    """
    high = high_grid(recipe)
    inside = {name for unit in source.description.units for name in unit.names}
    gains = {name: high for name, grid in low.items() if name in inside and grid.bits < high.bits}
    if not gains:
        raise UsageError(
            f"'{recipe.name}' has nothing to mix: what matters most would get {high}, and the rest has "
            f"{parse(recipe.grid)} already; give the rest fewer bits, or take a method that mixes nothing."
        )
    return dict(low) | gains


def _ways(
    source: Source, recipe: Recipe, low: dict[str, Grid], budget: int, kls: Mapping[str, float]
) -> dict[str, dict[str, Grid]]:
    """The proposal, what a flatter and a steeper belief in the predictions would give, the positional rule, all low."""
    ways = {}
    for name, power in _POWERS.items():
        bent = {group: kl**power for group, kl in kls.items()}
        ways[name], _ = under_budget(source, recipe, low, budget, bent)
    try:
        positional, bits = positional_budget(source, recipe, low)
    except UsageError:  # the rule does not apply to this model; there is one way less
        positional, bits = {}, budget + 1
    if bits <= budget:
        ways["positional"] = positional
    return ways | {_UNIFORM: low}


def _accepted_details(measured: Mapping[str, float], best: str) -> dict[str, str]:
    return {
        "bits proposed on": f"calibration samples 1 to {fisher.SAMPLES}, the first {fisher.LENGTH} tokens of each",
        "bits accepted on": f"the last {accept.SAMPLES} samples, the first {accept.LENGTH} tokens of each",
        "measured KL (nats)": ", ".join(f"{name} {kl:.5f}" for name, kl in measured.items()),
        "accepted": best,
    }


def under_budget(
    source: Source, recipe: Recipe, low: dict[str, Grid], budget: int, kls: Mapping[str, float]
) -> tuple[dict[str, Grid], tuple[Choice, ...]]:
    """The grids that the least summed KL takes within `budget` bits, from each group's KL alone at the low width."""
    high = _raised(source, recipe, low)
    groups, parameters = _units(source, low), source.search.parameters
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


def mixed_budget(source: Source, recipe: Recipe, low: dict[str, Grid]) -> int:
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
    smallest, largest = size_limits(source, recipe, low)
    if not smallest <= recipe.budget <= largest:
        side = "below the smallest" if recipe.budget < smallest else "above the largest"
        raise UsageError(
            f"'{recipe.name}': a budget of {recipe.budget:g} bits per weight is {side} possible size; "
            f"this model takes {math.ceil(smallest * 1000) / 1000:.3f} to {math.floor(largest * 1000) / 1000:.3f}."
        )
    parameters = source.search.parameters
    weights = sum(parameters[name].numel() for name in low)
    reserved = _explicit_bits(source, low) if recipe.uses_awq else 0
    return max(int(recipe.budget * weights) - reserved, _bits(low, parameters))  # a product may round below its limit


def size_limits(source: Source, recipe: Recipe, low: Mapping[str, Grid]) -> tuple[float, float]:
    """The least and the most bits per weight that a mixed recipe can take, input scales included.

    Raises:
        UsageError: no weight would get more bits.
    """
    parameters = source.search.parameters
    weights = sum(parameters[name].numel() for name in low)
    reserved = _explicit_bits(source, low) if recipe.uses_awq else 0
    least, most = (_bits(grids, parameters) for grids in (low, _raised(source, recipe, low)))
    return (least + reserved) / weights, (most + reserved) / weights


def _explicit_bits(source: Source, low: Mapping[str, Grid]) -> int:
    explicit = [g for g in source.description.groups if g.is_explicit and (g.fold is None or g.fold.repeat > 1)]
    groups = [g for g in explicit if any(name in low for name in g.names)]
    return sum(group.columns * len(group.names) * _SCALE_BITS for group in groups)


def effective_of(source: Source, recipe: Recipe, grids: Mapping[str, Grid]) -> Effective:
    """What a unit's matrices do once quantized, as they act in the unfolded model; only its layer is looked at."""
    search = source.search

    @lru_cache(maxsize=1)
    def at(index: int) -> tuple[list[Group], Scales, Mapping[str, Tensor]]:
        layer = [group for group in source.description.groups if group.layer == index]
        scales = search.scales(layer, grids) if recipe.uses_awq else {}
        return layer, scales, row_divisors(scales, search.parameters)

    def of(unit: Group) -> dict[str, Tensor]:
        layer, scales, divisors = at(unit.layer)
        found: dict[str, Tensor] = {}
        for group in (each for each in layer if each.names[0] in unit.names):
            weights = quantize_groups(search, [group], grids, scales, divisors, clip=recipe.clips)
            scaled = scales.get(group.names[0])
            found |= {name: effective(name, weight, scaled, divisors) for name, weight in weights.items()}
        return found

    return of


def _units(source: Source, grids: Mapping[str, Grid]) -> list[Group]:
    return [unit for unit in source.description.units if any(name in grids for name in unit.names)]


def _choice(source: Source, group: Group, grids: Mapping[str, Grid], low: float | None, high: float | None) -> Choice:
    names = tuple(name for name in group.names if name in grids)
    parameters = sum(source.search.parameters[name].numel() for name in names)
    return Choice(group.layer, group.kind, names, parameters, low, high, max(grids[n].bits for n in names))


def _bits(grids: Mapping[str, Grid], parameters: Parameters) -> int:
    return sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items())
