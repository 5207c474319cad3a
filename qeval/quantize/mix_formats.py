"""Choose the format of each group of linears, among any number, under a size budget.

A group's linears share an input, so that what runtimes fuse (queries, keys and values; gate and up) has one format, and
so have a layer's experts. Every group is tried alone on every grid; in float it loses nothing. `mix.py` chooses between
two widths of integers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.structure.graph import Group
from qeval.progress import Advance
from qeval.quant.grid import FLOAT, WeightGrid, parse
from qeval.quant.knapsack import FormatOption, choose_formats
from qeval.quant.qweight import check_fits
from qeval.quant.variant import Choice
from qeval.quantize.context import Source
from qeval.quantize.mix import (
    POWERS,
    MixedGrids,
    accept,
    check_size,
    effective_of,
    input_scale_bits,
    matrix_bits,
    size_range,
)
from qeval.quantize.sensitivity import finite_kls

_Kls = Mapping[str, Mapping[str, float]]
"""The KL in nats of each group alone on a grid, by the grid's name, then by the group's first name."""


class _Plan(NamedTuple):
    """All that a choice rests on but the KLs.

    `grids`: of every weight, the cheapest format where it is chosen. `units`: the groups that it is chosen for.
    `names`: those of each unit's weights that no rule gives a format. `sizes`: their bits, by format. `rest`: the bits
    of all other weights. `parameters`: of all weights together.
    """

    grids: dict[str, WeightGrid]
    units: tuple[Group, ...]
    names: tuple[tuple[str, ...], ...]
    sizes: tuple[dict[str, int], ...]
    rest: int
    parameters: int

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the most bits that a choice can take."""
        least, most = (self.rest + sum(pick(sizes.values()) for sizes in self.sizes) for pick in (min, max))
        return least, most

    @property
    def bits_per_weight(self) -> tuple[float, float]:
        """The same in bits per weight."""
        least, most = self.limits
        return least / self.parameters, most / self.parameters

    def with_formats(self, formats: Sequence[str]) -> dict[str, WeightGrid]:
        """Return the grids with a format for each unit; weights that stay in float have none."""
        chosen = {name: each for names, each in zip(self.names, formats, strict=True) for name in names}
        return {
            name: parse(chosen[name]) if name in chosen else grid
            for name, grid in self.grids.items()
            if chosen.get(name) != FLOAT
        }


def mix_formats(source: Source, recipe: Recipe, low: dict[str, WeightGrid], advance: Advance) -> MixedGrids:
    """Return the grids of a mix of formats.

    Args:
        source: The model, and a way to try quantized groups.
        recipe: A mixed method's, with its formats, its budget and its importance.
        low: The grids of all weights, the cheapest format where no rule gives another.
        advance: Called with `mix.trial_units` in all.

    Raises:
        UsageError: No choice meets the recipe's budget, or there is none.
    """
    budget = format_budget(source, recipe, low)  # refused before the long measurement, not after
    plan = _plan(source, recipe, low)
    kls = _sensitivities(source, recipe, plan, advance)
    if recipe.importance == "measured":
        formats = _choose(plan, recipe, budget, kls)
        return MixedGrids(plan.with_formats(formats), _choices(source, plan, formats, kls), {})

    # predicted sensitivities propose whole mixes, of which the one that measures best is taken
    proposals = _proposals(plan, recipe, budget, kls)
    grids = {name: plan.with_formats(formats) for name, formats in proposals.items()}
    best, details = accept(source, recipe, grids, advance)
    return MixedGrids(grids[best], _choices(source, plan, proposals[best], {}), details)


def format_budget(source: Source, recipe: Recipe, low: Mapping[str, WeightGrid]) -> int:
    """Return the bits that all weights may take together, input scales and groups in float included.

    Raises:
        UsageError: There is no budget, or no choice meets it; the possible sizes are named.
    """
    plan = _plan(source, recipe, low)
    least, most = plan.bits_per_weight
    if recipe.budget is None:
        raise UsageError(
            f"'{recipe.name}' names formats and no size; add one such as {(least + most) / 2:.1f}bpw, or --budget: "
            f"this model takes {size_range(least, most)} bits per weight."
        )
    check_size(recipe, recipe.budget, least, most)
    budget = max(int(recipe.budget * plan.parameters), plan.limits[0])  # a product may round below its limit
    if budget >= plan.limits[1] and not plan.with_formats([recipe.candidates[-1]] * len(plan.units)):
        raise UsageError(
            f"'{recipe.name}': a budget of {recipe.budget:g} bits per weight leaves every group in float; there is "
            "nothing to compare, so take a smaller one."
        )
    return budget


def format_limits(source: Source, recipe: Recipe, low: Mapping[str, WeightGrid]) -> tuple[float, float]:
    """Return the least and the most bits per weight that a mix of formats can take, input scales included."""
    return _plan(source, recipe, low).bits_per_weight


def free_names(source: Source, recipe: Recipe, low: Mapping[str, WeightGrid]) -> set[str]:
    """Return the weights whose format is chosen: those of decoder layers that no rule of the recipe gives one."""
    return {
        name
        for unit in source.description.units
        for name in unit.names
        if name in low and recipe.rule_for(name) is None
    }


def _plan(source: Source, recipe: Recipe, low: Mapping[str, WeightGrid]) -> _Plan:
    """Return what is chosen for, and what every choice takes on disk.

    Raises:
        UsageError: Rules leave nothing to choose, or a block is larger than a row.
    """
    parameters, free = source.search.parameters, free_names(source, recipe, low)
    if not free:
        raise UsageError(
            f"'{recipe.name}' has nothing to mix: its rules give every weight a format; leave some out, or take a "
            "method that mixes nothing."
        )
    units = tuple(unit for unit in source.description.units if not free.isdisjoint(unit.names))
    names = tuple(tuple(name for name in unit.names if name in free) for unit in units)

    for name in free:
        for grid in map(parse, recipe.trial_grids):
            check_fits(name, parameters[name].shape[1], grid)

    # scales of an input are there as soon as one matrix of its group is quantized
    fixed = {name: grid for name, grid in low.items() if name not in free}
    scaled = [group for group in source.description.groups if recipe.quant_method.scales_inputs]
    always = sum(input_scale_bits(group) for group in scaled if not fixed.keys().isdisjoint(group.names))
    extra = {group.names[0]: input_scale_bits(group) for group in scaled if fixed.keys().isdisjoint(group.names)}

    def bits(unit: Group, chosen: Sequence[str], format_name: str) -> int:
        if format_name == FLOAT:
            return sum(parameters[name].numel() for name in chosen) * source.float_bits
        return matrix_bits(dict.fromkeys(chosen, parse(format_name)), parameters) + extra.get(unit.names[0], 0)

    sizes = tuple(
        {each: bits(unit, chosen, each) for each in recipe.candidates}
        for unit, chosen in zip(units, names, strict=True)
    )
    rest = matrix_bits(fixed, parameters) + always
    return _Plan(dict(low), units, names, sizes, rest, sum(parameters[name].numel() for name in low))


def _sensitivities(source: Source, recipe: Recipe, plan: _Plan, advance: Advance) -> _Kls:
    """Measure or predict the KL of every group alone on every grid."""
    kls = {}
    for name in recipe.trial_grids:
        trials = source.trials.on_grid(name)
        trial = trials.measure if recipe.importance == "measured" else trials.predict
        effective = effective_of(source, recipe, plan.with_formats([name] * len(plan.units)))
        kls[name] = finite_kls(recipe.name, trial(effective, advance))
    return kls


def _choose(plan: _Plan, recipe: Recipe, budget: int, kls: _Kls, power: float = 1.0) -> list[str]:
    """Return the format of each unit with the least summed KL under a budget, every KL raised to a power."""
    options = [
        [
            FormatOption(bits, 0.0 if name == FLOAT else max(kls[name][unit.names[0]], 0.0) ** power)
            for name, bits in sizes.items()
        ]
        for unit, sizes in zip(plan.units, plan.sizes, strict=True)
    ]
    return [recipe.candidates[pick] for pick in choose_formats(options, budget - plan.rest)]


def _proposals(plan: _Plan, recipe: Recipe, budget: int, kls: _Kls) -> dict[str, list[str]]:
    """Return the mixes to measure: by the predictions, by flatter and steeper ones, and each grid alone that fits."""
    proposals = {name: _choose(plan, recipe, budget, kls, power) for name, power in POWERS.items()}
    for name in recipe.trial_grids:
        if plan.rest + sum(sizes[name] for sizes in plan.sizes) <= budget:
            proposals[f"all {name}"] = [name] * len(plan.units)
    return proposals


def _choices(source: Source, plan: _Plan, formats: Sequence[str], kls: _Kls) -> tuple[Choice, ...]:
    """Return what was chosen for each unit, and the KLs that it rests on; none where they are predicted."""
    choices = []
    for unit, names, chosen in zip(plan.units, plan.names, formats, strict=True):
        own = {name: by_unit[unit.names[0]] for name, by_unit in kls.items()}
        alone: list[float] | list[None] = list(own.values()) or [None]
        weights = sum(source.search.parameters[name].numel() for name in names)
        bits = source.float_bits if chosen == FLOAT else parse(chosen).bits
        choices.append(Choice(unit.layer, unit.kind, names, weights, alone[0], alone[-1], bits, chosen, own))
    return tuple(choices)
