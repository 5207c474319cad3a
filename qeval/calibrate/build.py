"""A recipe and a model become a variant; every weight of the model is accounted for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qeval.calibrate.groups import (
    Grids,
    Parameters,
    Scaled,
    Search,
    explicit_scales,
    folded_floats,
    quantize_groups,
    row_divisors,
)
from qeval.calibrate.in_order import Options, Outcome, quantize_in_order
from qeval.calibrate.mix import Mix, high_grid, mix, mixed_budget
from qeval.calibrate.source import InMemory, Source
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
from qeval.quant.qweight import QWeight, check_fits
from qeval.quant.rtn import quantize
from qeval.quant.variant import Kept, Stored, Variant

_FLOAT = "float"
_NAMED_AT_MOST = 8


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
    trials = InMemory(model, description, head, samples)
    return Source(model, description, head, samples, Search(parameters, dict(statistics)), trials)


@torch.inference_mode()
def build(source: Source, recipe: Recipe, key: str, advance: Advance) -> Variant:
    """The variant of `recipe`. `advance` is told `trial_units`, then `rounding_units` of its outline.

    Raises:
        UsageError: a block larger than a row, a budget that no choice meets, a rule that matches nothing.
    """
    grids, plan = outline(source, recipe, key, advance)
    return carried_out(source, recipe, grids, plan, advance)


def rounding_units(recipe: Recipe, plan: Variant) -> int:
    """What making an outline's variant tells its progress in all: its weights, twice where they are scaled first."""
    return rounding_units_of(recipe, sum(weight.codes.numel() for weight in plan.weights.values()))


def rounding_units_of(recipe: Recipe, weights: int) -> int:
    """What so many weights count in `rounding_units`."""
    return weights * (2 if recipe.uses_awq else 1)


@torch.inference_mode()
def carried_out(source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
    """The variant of an outline. `advance` is told `rounding_units`, but by another tool nothing."""
    if recipe.tool:
        return _by_tool(source, recipe, grids, plan)
    if recipe.uses_gptq:
        weights, told = _in_order(source, recipe, grids, advance)
        variant = replace(plan, weights=weights, details={**plan.details, **told})
    else:
        made = quantize_alone(source.search, source.description.groups, recipe, grids, advance)
        variant = replace(with_floats(plan, recipe, [made]), weights=made.weights)
    if source.description.head not in grids:
        return variant
    head = quantize(source.head.weight.float(), grids[source.description.head])
    advance(rounding_units_of(recipe, head.codes.numel()))
    return replace(variant, weights={**variant.weights, source.description.head: head})


def _by_tool(source: Source, recipe: Recipe, grids: Grids, plan: Variant) -> Variant:
    """What another tool makes of the model, in the one form that all variants have."""
    tool = installed_tool(recipe.method)
    job = Job(source.model, source.search.parameters, grids, recipe.algorithm, source.samples)
    with torch.inference_mode(mode=False):
        made = tool.quantize(job)
    values = {name: each for name, each in made.items() if isinstance(each, Values)}
    return Variant(
        key=plan.key,
        weights={name: each for name, each in made.items() if isinstance(each, QWeight)},
        floats={name: each.values for name, each in values.items()},
        input_scales={},
        kept=plan.kept,
        details={"made by": f"{tool.distribution} {tool_version(recipe.method)}"},
        stored=tuple(Stored(name, each.values.numel(), each.form, each.size_bits) for name, each in values.items()),
    )


def outline(source: Source, recipe: Recipe, key: str, advance: Advance) -> tuple[dict[str, Grid], Variant]:
    """The grids of a recipe, and its variant before any number is known: its matrices are on the meta device.

    Raises:
        UsageError: as `build`.
    """
    grids, kept = assign(source, recipe, parse(recipe.grid))
    chosen = mix(source, recipe, grids, advance) if recipe.mixed else Mix(grids, (), {})
    grids = chosen.grids
    inside = [name for name in quantizable(source.description) if name in grids]
    names = [*inside, *([source.description.head] if source.description.head in grids else [])]
    weights = {name: _weightless(source.search.parameters[name], grids[name]) for name in names}
    return grids, Variant(key, weights, {}, {}, kept, chosen.choices, _details(recipe) | chosen.details)


class Made(NamedTuple):
    """Some groups' quantized matrices, AWQ's scales, the float tensors that these were folded into, and the groups (by
    their first names) that no calibration token reached."""

    weights: dict[str, QWeight]
    scales: Mapping[str, Scaled]
    floats: dict[str, torch.Tensor]
    unseen: list[str]


def quantize_alone(search: Search, groups: Sequence[Group], recipe: Recipe, grids: Grids, advance: Advance) -> Made:
    """Every group (whole layers of them) quantized for the inputs that the float model gives it.

    `advance` is told the weights of each group when its scales are found, where there are any, and when it is rounded.
    """
    scales: dict[str, Scaled] = {}
    for group in groups if recipe.uses_awq else ():
        scales |= search.scales([group], grids)
        advance(_weights_of(search, group, grids))
    divisors = row_divisors(scales, search.parameters)
    weights: dict[str, QWeight] = {}
    for group in groups:
        weights |= quantize_groups(search, [group], grids, scales, divisors, clip=recipe.clips)
        advance(_weights_of(search, group, grids))
    unseen = [group.names[0] for group in groups if group.names[0] not in search.statistics]
    return Made(weights, scales, folded_floats(scales, search.parameters, grids), unseen)


def _weights_of(search: Search, group: Group, grids: Grids) -> int:
    return sum(search.parameters[name].numel() for name in group.names if name in grids)


def with_floats(plan: Variant, recipe: Recipe, parts: Sequence[Made]) -> Variant:
    """A plan with the float tensors and input scales that quantizing its groups, part by part, came to."""
    scales = {name: scaled for part in parts for name, scaled in part.scales.items()}
    floats = dict(sorted((name, value) for part in parts for name, value in part.floats.items()))
    explicit = sum(scaled.fold is None for scaled in scales.values())
    words = f"{len(scales)} groups scaled, {explicit} of them on the input explicitly"
    unseen = [name for part in parts for name in part.unseen]
    told = {"input scales": words} | _unseen(unseen) if recipe.uses_awq else {}
    return replace(plan, floats=floats, input_scales=explicit_scales(scales), details={**plan.details, **told})


def gptq_options(recipe: Recipe) -> Options:
    """How GPTQ rounds by a recipe."""
    return Options(recipe.damping_share, recipe.orders_by_moment, recipe.clips)


def _in_order(
    source: Source, recipe: Recipe, grids: Grids, advance: Advance
) -> tuple[dict[str, QWeight], dict[str, str]]:
    """Every group quantized for what the quantized groups before it give it; and that in words."""
    options = gptq_options(recipe)
    outcomes = quantize_in_order(source.model, source.description, source.samples, grids, options, advance)
    return {outcome.name: outcome.rounded.weight for outcome in outcomes}, gptq_details(recipe, outcomes)


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


def gptq_details(recipe: Recipe, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What GPTQ decided, and what it gained on the calibration text, in words."""
    order = "largest second moment first" if recipe.orders_by_moment else "as they stand"
    seen = [outcome for outcome in outcomes if outcome.is_seen]
    loss = sum(outcome.rounded.loss for outcome in seen)
    plain_loss = sum(outcome.rounded.plain_loss for outcome in seen)
    rows = sum(len(outcome.rounded.weight.codes) for outcome in seen)
    raised = [outcome for outcome in seen if outcome.damping != recipe.damping_share]
    return {
        "columns": f"{order}; each block's steps are those of its float weights",
        "damping": f"{recipe.damping_share:g} of the mean second moment",
        "damping raised": ", ".join(f"{outcome.name} to {outcome.damping:g}" for outcome in raised) or "nowhere",
        "loss on the calibration text": f"{loss / plain_loss if plain_loss else 1.0:.4f} of plain rounding's",
        "rows rounded plainly": f"{sum(outcome.rounded.plain_rows for outcome in seen)} of {rows}",
    } | _unseen([outcome.name for outcome in outcomes if not outcome.is_seen])


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
