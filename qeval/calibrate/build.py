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
from qeval.calibrate.mix import Mix, budget_of, high_grid, mix
from qeval.calibrate.source import InMemory, Source
from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.models.graph import Description, Group
from qeval.models.head import Head
from qeval.progress import Advance
from qeval.quant.grid import Grid, PerBlock, parse
from qeval.quant.qweight import QWeight, check_fits
from qeval.quant.rtn import quantize
from qeval.quant.variant import Kept, Variant

_FLOAT = "float"


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
    trials = InMemory(model, description, head, samples)
    return Source(model, description, head, samples, Search(parameters, dict(statistics)), trials)


@torch.inference_mode()
def build(source: Source, recipe: Recipe, key: str, advance: Advance) -> Variant:
    """The variant of `recipe`. `advance` is told 1 for every group whose sensitivity was measured.

    Raises:
        UsageError: a block larger than a row, a budget that no choice meets, a rule that matches nothing.
    """
    grids, plan = outline(source, recipe, key, advance)
    if recipe.uses_gptq:
        weights, told = _in_order(source, recipe, grids, advance)
        variant = replace(plan, weights=weights, details={**plan.details, **told})
    else:
        made = quantize_alone(source.search, source.description.groups, recipe, grids)
        variant = replace(with_floats(plan, recipe, [made]), weights=made.weights)
    if source.description.head not in grids:
        return variant
    head = quantize(source.head.weight.float(), grids[source.description.head])
    return replace(variant, weights={**variant.weights, source.description.head: head})


def outline(source: Source, recipe: Recipe, key: str, advance: Advance) -> tuple[dict[str, Grid], Variant]:
    """The grids of a recipe, and its variant before any number is known: its matrices are on the meta device.

    Raises:
        UsageError: as `build`.
    """
    grids, kept = _assign(source, recipe, parse(recipe.grid))
    chosen = mix(source, recipe, grids, advance) if recipe.mixed else Mix(grids, (), {})
    grids = chosen.grids
    inside = [name for name in quantizable(source.description) if name in grids]
    names = [*inside, *([source.description.head] if source.description.head in grids else [])]
    weights = {name: _weightless(source.search.parameters[name], grids[name]) for name in names}
    return grids, Variant(key, weights, {}, {}, kept, chosen.choices, _details(recipe) | chosen.details)


class Made(NamedTuple):
    """Some groups' quantized matrices, AWQ's scales, and the float tensors that these were folded into."""

    weights: dict[str, QWeight]
    scales: Mapping[str, Scaled]
    floats: dict[str, torch.Tensor]


def quantize_alone(search: Search, groups: Sequence[Group], recipe: Recipe, grids: Grids) -> Made:
    """Every group (whole layers of them) quantized for the inputs that the float model gives it."""
    scales = search.scales(groups, grids) if recipe.uses_awq else {}
    divisors = row_divisors(scales, search.parameters)
    weights = quantize_groups(search, groups, grids, scales, divisors, clip=recipe.clips)
    return Made(weights, scales, folded_floats(scales, search.parameters, grids))


def with_floats(plan: Variant, recipe: Recipe, parts: Sequence[Made]) -> Variant:
    """A plan with the float tensors and input scales that quantizing its groups, part by part, came to."""
    scales = {name: scaled for part in parts for name, scaled in part.scales.items()}
    floats = {name: value for part in parts for name, value in part.floats.items()}
    explicit = sum(scaled.fold is None for scaled in scales.values())
    words = f"{len(scales)} groups scaled, {explicit} of them on the input explicitly"
    told = {"input scales": words} if recipe.uses_awq else {}
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
    grids, _ = _assign(source, recipe, parse(recipe.grid))
    if not recipe.mixed:
        return {name: (grid,) for name, grid in grids.items()}
    budget_of(source, recipe, grids)
    return {name: (grid, high_grid(recipe)) for name, grid in grids.items()}


def quantizable(description: Description) -> list[str]:
    """The names of all linears in decoder layers, in the order of the computation."""
    return [name for group in description.groups for name in group.names]


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


def gptq_details(recipe: Recipe, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What GPTQ decided, and what it gained on the calibration text, in words."""
    order = "largest second moment first" if recipe.orders_by_moment else "as they stand"
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
