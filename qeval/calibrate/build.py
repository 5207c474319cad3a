"""A recipe and a model become a variant; every weight of the model is accounted for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from qeval.calibrate import accept, fisher
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
from qeval.calibrate.in_order import Options, Outcome, quantize_in_order
from qeval.calibrate.sensitivity import measure
from qeval.calibrate.tools.base import Job
from qeval.calibrate.tools.registry import installed_tool, tool_version
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.formats.base import Values
from qeval.models.graph import Description, Group
from qeval.models.head import Head
from qeval.models.matrices import is_expert, weights_of
from qeval.progress import Advance
from qeval.quant.grid import Grid, PerBlock, parse
from qeval.quant.mixed import Option, choose_high, positional_names
from qeval.quant.qweight import QWeight, check_fits
from qeval.quant.rtn import quantize
from qeval.quant.variant import Choice, Kept, Stored, Variant

_FLOAT = "float"
_NAMED_AT_MOST = 8
_SCALE_BITS = 32
HIGH_BITS = 8
_POWERS = {"proposal": 1.0, "flatter": 0.7, "steeper": 1.4}
"""Neighbours of a proposal: what it would be if the predictions' logarithms were shrunk or stretched."""
_UNIFORM = "all low"
"""Measured beside the ways to spend the budget, and never taken: it spends nothing."""


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
    parameters = weights_of(model)
    parameters.setdefault(description.head, head.weight)
    return Source(model, description, head, samples, Search(parameters, dict(statistics)))


@torch.inference_mode()
def build(source: Source, recipe: Recipe, key: str, advance: Advance) -> Variant:
    """The variant of `recipe`. `advance` is told 1 for every group whose sensitivity was measured.

    Raises:
        UsageError: a block larger than a row, a budget that no choice meets, a rule that matches nothing.
    """
    grids, kept = assign(source, recipe, parse(recipe.grid))
    choices: tuple[Choice, ...] = ()
    told: dict[str, str] = {}
    if recipe.mixed:
        mix = _mix(source, recipe, grids, advance)
        grids, choices, told = mix.grids, mix.choices, mix.details
    if recipe.tool:
        return _by_tool(source, recipe, grids, kept, key)
    made = (_in_order if recipe.uses_gptq else _each_alone)(source, recipe, grids, advance)
    if source.description.head in grids:
        made.weights[source.description.head] = _quantize_head(source, grids)
    return Variant(
        key=key,
        weights=made.weights,
        floats=folded_floats(made.scales, source.search.parameters, grids),
        input_scales=explicit_scales(made.scales),
        kept=kept,
        choices=choices,
        details=_details(recipe) | told | made.details,
    )


def _by_tool(source: Source, recipe: Recipe, grids: Mapping[str, Grid], kept: tuple[Kept, ...], key: str) -> Variant:
    """What another tool makes of the model, in the one form that all variants have."""
    tool = installed_tool(recipe.method)
    job = Job(source.model, source.search.parameters, grids, recipe.algorithm, source.samples)
    with torch.inference_mode(mode=False):
        made = tool.quantize(job)
    values = {name: each for name, each in made.items() if isinstance(each, Values)}
    return Variant(
        key=key,
        weights={name: each for name, each in made.items() if isinstance(each, QWeight)},
        floats={name: each.values for name, each in values.items()},
        input_scales={},
        kept=kept,
        details={"made by": f"{tool.distribution} {tool_version(recipe.method)}"},
        stored=tuple(Stored(name, each.values.numel(), each.form, each.size_bits) for name, each in values.items()),
    )


def outline(source: Source, recipe: Recipe, key: str) -> tuple[dict[str, Grid], Variant]:
    """The grids of a recipe that needs no calibration, and its variant without numbers: matrices on the meta device.

    Raises:
        UsageError: as `build`.
    """
    grids, kept = assign(source, recipe, parse(recipe.grid))
    mix = _Mix(grids, (), {})
    if recipe.mixed:
        mix = _mix(source, recipe, grids, lambda done: None)
    grids = mix.grids
    inside = [name for name in quantizable(source.description) if name in grids]
    names = [*inside, *([source.description.head] if source.description.head in grids else [])]
    weights = {name: _weightless(source.search.parameters[name], grids[name]) for name in names}
    return grids, Variant(key, weights, {}, {}, kept, mix.choices, _details(recipe) | mix.details)


class _Mix(NamedTuple):
    """The grids that the bits were given out by, what was seen of each group, and how the choice was made, in words."""

    grids: dict[str, Grid]
    choices: tuple[Choice, ...]
    details: dict[str, str]


class _Made(NamedTuple):
    """The quantized matrices of the decoder layers, AWQ's scales, and what the method decided, in words."""

    weights: dict[str, QWeight]
    scales: Mapping[str, Scaled]
    details: dict[str, str]


def _each_alone(source: Source, recipe: Recipe, grids: Mapping[str, Grid], _: Advance) -> _Made:
    """Every group quantized for the inputs that the float model gives it."""
    groups = source.description.groups
    scales = source.search.scales(groups, grids) if recipe.uses_awq else {}
    divisors = row_divisors(scales, source.search.parameters)
    weights = quantize_groups(source.search, groups, grids, scales, divisors, clip=recipe.clips)
    if not recipe.uses_awq:
        return _Made(weights, scales, {})
    explicit = sum(scaled.fold is None for scaled in scales.values())
    words = f"{len(scales)} groups scaled, {explicit} of them on the input explicitly"
    unseen = [group.names[0] for group in groups if group.names[0] not in source.search.statistics]
    return _Made(weights, scales, {"input scales": words} | _unseen(unseen))


def _in_order(source: Source, recipe: Recipe, grids: Mapping[str, Grid], advance: Advance) -> _Made:
    """Every group quantized for what the quantized groups before it give it."""
    options = Options(recipe.damping_share, recipe.orders_by_moment, recipe.clips)
    outcomes = quantize_in_order(source.model, source.description, source.samples, grids, options, advance)
    weights = {outcome.name: outcome.rounded.weight for outcome in outcomes}
    unseen = [outcome.name for outcome in outcomes if not outcome.is_seen]
    return _Made(weights, {}, _gptq_details(recipe, outcomes) | _unseen(unseen))


def check(source: Source, recipe: Recipe) -> dict[str, tuple[Grid, ...]]:
    """Refuse what `build` would refuse, without its work: no calibration is needed.

    What each quantized weight may come out as is returned: its grid, or the two that a mixed method chooses between.

    Raises:
        UsageError: as `build`.
    """
    if recipe.tool:
        installed_tool(recipe.method)
    grids, _ = assign(source, recipe, parse(recipe.grid))
    if not recipe.mixed:
        return {name: (grid,) for name, grid in grids.items()}
    mixed_budget(source, recipe, grids)
    return {name: (grid, high_grid(recipe)) for name, grid in grids.items()}


def quantizable(description: Description) -> list[str]:
    """The names of all linears in decoder layers, in the order of the computation."""
    return [name for group in description.groups for name in group.names]


def positional_budget(source: Source, recipe: Recipe, grids: Mapping[str, Grid]) -> tuple[dict[str, Grid], int]:
    """The grids under the positional rule, and their size in bits."""
    high = high_grid(recipe)
    last = {unit.layer: unit.names for unit in source.description.units}
    chosen = positional_names(grids, len(source.description.layers), last)
    mixed = {name: high if name in chosen else grid for name, grid in grids.items()}
    return mixed, _bits(mixed, source.search.parameters)


def high_grid(recipe: Recipe) -> Grid:
    """The grid of the weights that matter most: the low grid with 8 bits unless the recipe names another."""
    low = parse(recipe.grid)
    return replace(low, bits=HIGH_BITS) if recipe.high is None else parse(recipe.high, low)


def assign(source: Source, recipe: Recipe, grid: Grid) -> tuple[dict[str, Grid], tuple[Kept, ...]]:
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
    if name in description.routers:
        return "a router: it decides which experts run"
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


def _mix(source: Source, recipe: Recipe, low: dict[str, Grid], advance: Advance) -> _Mix:
    budget = mixed_budget(source, recipe, low)  # refused before the long measurement, not after
    if recipe.importance == "positional":
        grids, _ = positional_budget(source, recipe, low)
        return _Mix(grids, tuple(_choice(source, group, grids, None, None) for group in _units(source, low)), {})
    own = (source.model, source.description, source.head)
    if recipe.importance == "measured":
        kls = measure(*own, source.samples, effective_of(source, recipe, low), advance)
        return _Mix(*under_budget(source, recipe, low, budget, kls), {})
    if len(source.samples) < fisher.SAMPLES + accept.SAMPLES:
        raise UsageError(
            f"'{recipe.name}': --importance fisher chooses on {fisher.SAMPLES} calibration samples and accepts on "
            f"{accept.SAMPLES} others; give at least {fisher.SAMPLES + accept.SAMPLES} --calibration-samples."
        )
    kls = fisher.predict(*own, source.samples, effective_of(source, recipe, low), advance)
    ways = _ways(source, recipe, low, budget, kls)
    effective = {name: effective_of(source, recipe, grids) for name, grids in ways.items()}
    measured = accept.measure_ways(*own, source.samples, effective)
    best = min((name for name in ways if name != _UNIFORM), key=measured.__getitem__)
    choices = tuple(_choice(source, group, ways[best], None, None) for group in _units(source, low))
    return _Mix(ways[best], choices, _accepted_details(measured, best))


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
    high = {name: high_grid(recipe) for name in low}
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
    explicit = [g for g in source.description.groups if g.is_explicit and (g.fold is None or g.fold.repeat > 1)]
    groups = [g for g in explicit if any(name in low for name in g.names)]
    return sum(group.columns * len(group.names) * _SCALE_BITS for group in groups)


def effective_of(
    source: Source, recipe: Recipe, grids: Mapping[str, Grid]
) -> Callable[[Group], dict[str, torch.Tensor]]:
    """What gives each group's quantized matrices as they act in the unfolded model; scales are searched here."""
    search, every = source.search, source.description.groups
    scales = search.scales(every, grids) if recipe.uses_awq else {}
    divisors = row_divisors(scales, search.parameters)

    by_name = {name: group for group in every for name in group.names}

    def of(unit: Group) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for group in {by_name[name].names[0]: by_name[name] for name in unit.names}.values():
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


def _quantize_head(source: Source, grids: Mapping[str, Grid]) -> QWeight:
    return quantize(source.head.weight.float(), grids[source.description.head])


def _gptq_details(recipe: Recipe, outcomes: Sequence[Outcome]) -> dict[str, str]:
    order = "largest second moment first" if recipe.orders_by_moment else "as they stand"
    outcomes = [outcome for outcome in outcomes if outcome.is_seen]
    loss = sum(outcome.rounded.loss for outcome in outcomes)
    plain_loss = sum(outcome.rounded.plain_loss for outcome in outcomes)
    rows = sum(len(outcome.rounded.weight.codes) for outcome in outcomes)
    raised = [outcome for outcome in outcomes if outcome.damping != recipe.damping_share]
    return {
        "columns": f"{order}; each block's steps are those of its float weights",
        "damping": f"{recipe.damping_share:g} of the mean second moment",
        "damping raised": ", ".join(f"{outcome.name} to {outcome.damping:g}" for outcome in raised) or "nowhere",
        "loss on the calibration text": f"{loss / plain_loss if plain_loss else 1.0:.4f} of plain rounding's",
        "rows rounded plainly": f"{sum(outcome.rounded.plain_rows for outcome in outcomes)} of {rows}",
    }


def _unseen(names: Sequence[str]) -> dict[str, str]:
    """What is told of experts that no calibration token was routed to."""
    experts = [name for name in names if is_expert(name)]
    listed = ", ".join(experts[:_NAMED_AT_MOST]) + (" ..." if len(experts) > _NAMED_AT_MOST else "")
    return {"rounded plainly, no token reached them": f"{len(experts)}: {listed}"} if experts else {}


def _weightless(parameter: torch.Tensor, grid: Grid) -> QWeight:
    rows, columns = parameter.shape
    shape = grid.scale_shape(rows, columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
    zeros = None if grid.symmetric else torch.empty(shape, dtype=torch.uint8, device="meta")
    return QWeight(grid, codes, torch.empty(shape, device="meta"), zeros)


def _details(recipe: Recipe) -> dict[str, str]:
    details = {"clip search": "per block" if recipe.clips else "none"}
    if recipe.quantize_head:
        details["head"] = "rounded to nearest"
    blocks = isinstance(parse(recipe.grid).granularity, PerBlock)
    details["short blocks"] = "a width that the block does not divide ends in a short block" if blocks else "none"
    return details
