"""Choose the groups of linears that get the high bit width: by measured or predicted sensitivity, or by position."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.structure.graph import Description, Group
from qeval.progress import Advance
from qeval.quant.grid import WeightGrid
from qeval.quant.mixed import WidthOption, choose_high, positional_names
from qeval.quant.variant import Choice
from qeval.quantize.context import Source
from qeval.quantize.fisher import FISHER_LENGTH, FISHER_SAMPLES
from qeval.quantize.scaling import Grids, Parameters, Scales, effective, quantize_groups, row_divisors
from qeval.quantize.select_mix import MIX_LENGTH, MIX_SAMPLES
from qeval.quantize.sensitivity import Effective, finite_kls, trial_passes

_SCALE_BITS = 32
POWERS = {"proposal": 1.0, "flatter": 0.7, "steeper": 1.4}
"""A proposal and its neighbours: what it would be if the predictions' logarithms were shrunk or stretched."""
_UNIFORM = "all low"
"""Measured for comparison and never taken: it spends nothing."""


class MixedGrids(NamedTuple):
    """The grid of every weight, the choice for every group, and how it was made, in words."""

    grids: dict[str, WeightGrid]
    choices: tuple[Choice, ...]
    details: dict[str, str]


def mix_grids(source: Source, recipe: Recipe, low: dict[str, WeightGrid], advance: Advance) -> MixedGrids:
    """Return the grids of a mixed recipe.

    Args:
        source: The model, and a way to try quantized groups.
        recipe: A mixed method's, with its budget and importance.
        low: The grids of all weights where no group has the high one.
        advance: Called with `trial_units` in all.

    Raises:
        UsageError: No choice meets the recipe's budget, or there are too few calibration samples.
    """
    budget = mixed_budget(source, recipe, low)  # refused before the long measurement, not after
    if recipe.importance == "positional":
        grids, _ = positional_budget(source, recipe, low)
        return MixedGrids(grids, tuple(_choice(source, group, grids, None, None) for group in _units(source, low)), {})
    if recipe.importance == "measured":
        kls = finite_kls(recipe.name, source.trials.measure(effective_of(source, recipe, low), advance))
        return MixedGrids(*under_budget(source, recipe, low, budget, kls), {})

    # predicted sensitivities propose whole mixes, of which the one that measures best is taken
    check_samples(recipe, len(source.samples))
    kls = finite_kls(recipe.name, source.trials.predict(effective_of(source, recipe, low), advance))
    proposals = _proposals(source, recipe, low, budget, kls)
    best, details = accept(source, recipe, proposals, advance, unspent=_UNIFORM)
    choices = tuple(_choice(source, group, proposals[best], None, None) for group in _units(source, low))
    return MixedGrids(proposals[best], choices, details)


def accept(
    source: Source, recipe: Recipe, proposals: Mapping[str, Grids], advance: Advance, *, unspent: str | None = None
) -> tuple[str, dict[str, str]]:
    """Return the name of the proposal that measures best on held-out text, and how it was found, in words.

    Args:
        source: The model, and a way to try whole mixes.
        recipe: The mix.
        proposals: The grids of every weight that is quantized, by the proposal's name.
        advance: Called with `trial_passes` in all.
        unspent: One that is measured for comparison and never taken.
    """
    effectives = {name: effective_of(source, recipe, grids) for name, grids in proposals.items()}
    measured = finite_kls(recipe.name, source.trials.measure_mixes(effectives, advance))
    best = min((name for name in proposals if name != unspent), key=measured.__getitem__)
    return best, _accepted_details(measured, best)


def trial_units(description: Description, recipe: Recipe) -> int:
    """Return `mix_grids`' units of progress: 0 by position; what is predicted is measured too, as whole mixes."""
    if not recipe.quant_method.mixes or recipe.importance == "positional":
        return 0
    return trial_passes(description) * (len(recipe.trial_grids) + (recipe.importance == "fisher"))


def check_samples(recipe: Recipe, samples: int) -> None:
    """Refuse a recipe that needs more calibration samples.

    Raises:
        UsageError: A mix that is predicted has no text left to be measured on.
    """
    needed = FISHER_SAMPLES + MIX_SAMPLES
    if recipe.quant_method.mixes and recipe.importance == "fisher" and samples < needed:
        raise UsageError(
            f"'{recipe.name}': --importance fisher chooses on {FISHER_SAMPLES} calibration samples and accepts on "
            f"{MIX_SAMPLES} others; give at least {needed} --calibration-samples."
        )


def positional_budget(
    source: Source, recipe: Recipe, grids: Mapping[str, WeightGrid]
) -> tuple[dict[str, WeightGrid], int]:
    """Return the grids under the positional rule, and their size in bits."""
    last = {unit.layer: unit.names for unit in source.description.units}
    chosen = positional_names(grids, len(source.description.layers), last)
    raised = _raised(source, recipe, grids)
    mixed = {name: raised[name] if name in chosen else grid for name, grid in grids.items()}
    return mixed, matrix_bits(mixed, source.search.parameters)


def _raised(source: Source, recipe: Recipe, low: Mapping[str, WeightGrid]) -> dict[str, WeightGrid]:
    """Return the grids where every weight that may get the high one has it.

    Weights outside the decoder layers never do, nor those that a rule of the recipe gives as many bits or more.

    Raises:
        UsageError: No weight would get more bits, so there is nothing to choose.
    """
    high = recipe.high_grid
    inside = {name for unit in source.description.units for name in unit.names}
    gains = {name: high for name, grid in low.items() if name in inside and grid.bits < high.bits}
    if not gains:
        raise UsageError(
            f"'{recipe.name}' has nothing to mix: what matters most would get {high}, and the rest has "
            f"{recipe.low_grid} already; give the rest fewer bits, or take a method that mixes nothing."
        )
    return dict(low) | gains


def _proposals(
    source: Source, recipe: Recipe, low: dict[str, WeightGrid], budget: int, kls: Mapping[str, float]
) -> dict[str, dict[str, WeightGrid]]:
    """Return the mixes to measure: by the predictions, by flatter and steeper ones, by position, and all low."""
    proposals = {}
    for name, power in POWERS.items():
        bent = {group: kl**power for group, kl in kls.items()}
        proposals[name], _ = under_budget(source, recipe, low, budget, bent)

    # the positional rule competes where it applies to the model and its size allows
    try:
        positional, bits = positional_budget(source, recipe, low)
    except UsageError:
        positional, bits = {}, budget + 1
    if bits <= budget:
        proposals["positional"] = positional
    return proposals | {_UNIFORM: low}


def _accepted_details(measured: Mapping[str, float], best: str) -> dict[str, str]:
    return {
        "bits proposed on": f"calibration samples 1 to {FISHER_SAMPLES}, the first {FISHER_LENGTH} tokens of each",
        "bits accepted on": f"the last {MIX_SAMPLES} samples, the first {MIX_LENGTH} tokens of each",
        "measured KL (nats)": ", ".join(f"{name} {kl:.5f}" for name, kl in measured.items()),
        "accepted": best,
    }


def under_budget(
    source: Source, recipe: Recipe, low: dict[str, WeightGrid], budget: int, kls: Mapping[str, float]
) -> tuple[dict[str, WeightGrid], tuple[Choice, ...]]:
    """Return the grids with the least summed KL under a budget, and the choice for every group.

    Args:
        source: The model.
        recipe: A mixed method's.
        low: The grids of all weights where no group has the high one.
        budget: Bits of all quantized weights together, on disk.
        kls: The KL in nats of each group alone on its low grid, by the group's first name.
    """
    high = _raised(source, recipe, low)
    groups, parameters = _units(source, low), source.search.parameters
    ratios = {name: 4.0 ** -(high[name].bits - low[name].bits) for name in low}  # KL goes with the step squared
    options = [
        WidthOption(
            matrix_bits({n: low[n] for n in group.names if n in low}, parameters),
            matrix_bits({n: high[n] for n in group.names if n in low}, parameters),
            kls[group.names[0]],
            kls[group.names[0]] * ratios[group.names[0]],
        )
        for group in groups
    ]

    # what is not in a group, such as the head, has its low grid in any case
    rest = matrix_bits(low, parameters) - sum(option.low_bits for option in options)
    picks = choose_high(options, budget - rest)
    grids = dict(low)
    for group, is_high in zip(groups, picks, strict=True):
        grids |= {name: high[name] for name in group.names if is_high and name in low}
    return grids, tuple(
        _choice(source, group, grids, option.low_kl, option.high_kl)
        for group, option in zip(groups, options, strict=True)
    )


def mixed_budget(source: Source, recipe: Recipe, low: dict[str, WeightGrid]) -> int:
    """Return the bits for codes, scales and zero points: the budget less what AWQ's input scales may need.

    Raises:
        UsageError: No choice meets the recipe's budget.
    """
    if recipe.importance == "positional" and recipe.budget is not None:
        raise UsageError(
            f"'{recipe.name}': the positional rule has its own size; leave --budget out, or take --importance measured."
        )
    if recipe.budget is None:
        return positional_budget(source, recipe, low)[1]
    check_size(recipe, recipe.budget, *size_limits(source, recipe, low))
    parameters = source.search.parameters
    weights = sum(parameters[name].numel() for name in low)
    reserved = _explicit_bits(source, low) if recipe.quant_method.scales_inputs else 0
    return max(
        int(recipe.budget * weights) - reserved, matrix_bits(low, parameters)
    )  # a product may round below its limit


def check_size(recipe: Recipe, budget: float, smallest: float, largest: float) -> None:
    """Refuse a budget in bits per weight that no choice meets, or that every choice is below.

    Raises:
        UsageError: It names the range.
    """
    if not smallest <= budget <= largest:
        side = "below the smallest" if budget < smallest else "above the largest"
        raise UsageError(
            f"'{recipe.name}': a budget of {budget:g} bits per weight is {side} possible size; "
            f"this model takes {size_range(smallest, largest)}."
        )


def size_range(smallest: float, largest: float) -> str:
    """Return a range of bits per weight in words, no wider than it is."""
    return f"{math.ceil(smallest * 1000) / 1000:.3f} to {math.floor(largest * 1000) / 1000:.3f}"


def size_limits(source: Source, recipe: Recipe, low: Mapping[str, WeightGrid]) -> tuple[float, float]:
    """Return the least and the most bits per weight that a mixed recipe can take, input scales included.

    Raises:
        UsageError: No weight would get more bits.
    """
    parameters = source.search.parameters
    weights = sum(parameters[name].numel() for name in low)
    reserved = _explicit_bits(source, low) if recipe.quant_method.scales_inputs else 0
    least, most = (matrix_bits(grids, parameters) for grids in (low, _raised(source, recipe, low)))
    return (least + reserved) / weights, (most + reserved) / weights


def _explicit_bits(source: Source, low: Mapping[str, WeightGrid]) -> int:
    groups = [group for group in source.description.groups if any(name in low for name in group.names)]
    return sum(map(input_scale_bits, groups))


def input_scale_bits(group: Group) -> int:
    """Return the most bits that the scales of a group's input take on disk, where nothing before can take them."""
    explicit = group.is_explicit and (group.fold is None or group.fold.repeat > 1)
    return group.columns * len(group.names) * _SCALE_BITS if explicit else 0


def effective_of(source: Source, recipe: Recipe, grids: Mapping[str, WeightGrid]) -> Effective:
    """Return a function that quantizes a unit of groups, and gives its matrices as they act in the unfolded model.

    Only the layer of the unit is searched. Of several units of one layer the scales are searched once.

    Args:
        source: The model and its statistics.
        recipe: Whether scales and clips are searched.
        grids: The grid of every weight that is quantized.
    """
    search = source.search

    @lru_cache(maxsize=1)
    def at(index: int) -> tuple[list[Group], Scales, Mapping[str, Tensor]]:
        layer = [group for group in source.description.groups if group.layer == index]
        scales = search.scales(layer, grids, fold_only=recipe.fold_only) if recipe.quant_method.scales_inputs else {}
        return layer, scales, row_divisors(scales, search.parameters)

    def of(unit: Group) -> dict[str, Tensor]:
        layer, scales, divisors = at(unit.layer)
        values: dict[str, Tensor] = {}
        for group in (member for member in layer if member.names[0] in unit.names):
            weights = quantize_groups(search, [group], grids, scales, divisors, clip=recipe.clips)
            scaled = scales.get(group.names[0])
            values |= {name: effective(name, weight, scaled, divisors) for name, weight in weights.items()}
        return values

    return of


def _units(source: Source, grids: Mapping[str, WeightGrid]) -> list[Group]:
    return [unit for unit in source.description.units if any(name in grids for name in unit.names)]


def _choice(
    source: Source, group: Group, grids: Mapping[str, WeightGrid], low: float | None, high: float | None
) -> Choice:
    names = tuple(name for name in group.names if name in grids)
    parameters = sum(source.search.parameters[name].numel() for name in names)
    return Choice(group.layer, group.kind, names, parameters, low, high, max(grids[n].bits for n in names))


def matrix_bits(grids: Mapping[str, WeightGrid], parameters: Parameters) -> int:
    """Return the bits of matrices on their grids, on disk."""
    return sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items())
