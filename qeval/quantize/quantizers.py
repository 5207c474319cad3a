"""From the plan of a variant to the variant: one quantizer for each way of rounding that a method may name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from qeval.config import Recipe
from qeval.formats.base import Values
from qeval.methods import Rounding
from qeval.models.structure.graph import Group
from qeval.models.structure.weight_views import expert_of, is_expert, stack_of
from qeval.progress import Advance
from qeval.quant.grid import Grid
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import quantize_rtn
from qeval.quant.variant import StoredMatrix, Variant
from qeval.quantize.context import Source
from qeval.quantize.scaling import Grids, Scaled, Search, explicit_scales, folded_floats, quantize_groups, row_divisors
from qeval.quantize.sequential import Options, RoundedMatrix, quantize_in_order
from qeval.quantize.smoothing import largest_inputs, smoothed_groups
from qeval.quantize.tools.base import ToolJob
from qeval.quantize.tools.registry import installed_tool, tool_version

_NAMED_AT_MOST = 8


class Quantizer(Protocol):
    """One way to turn the weights of a model into integers; what a recipe's method names as its rounding."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this machine lacks something for.

        Raises:
            UsageError: A package is not installed.
        """
        ...

    def quantize(self, source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
        """Return the variant of a plan; the model is left as it was.

        Args:
            source: The model, its calibration text and the statistics that the recipe needs.
            recipe: What to do.
            grids: The grid of every weight that is quantized.
            plan: The variant with its matrices on the meta device.
            advance: Called with `rounding_units` in all; never by another tool.
        """
        ...


class Nearest:
    """Rounds every group for the inputs that the float model gives it, after AWQ's scales where a method has them."""

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe."""

    def quantize(self, source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
        """As `Quantizer.quantize`."""
        rounded = quantize_alone(source.search, source.description.groups, recipe, grids, advance)
        variant = replace(with_floats(plan, recipe, [rounded]), weights=rounded.weights)
        return _with_head(variant, source, recipe, grids, advance)


class Sequential:
    """GPTQ: rounds every group for the inputs that the quantized groups before it give it."""

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe."""

    def quantize(self, source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
        """As `Quantizer.quantize`."""
        options = gptq_options(recipe)
        outcomes = quantize_in_order(
            source.model,
            source.description,
            source.samples,
            grids,
            options,
            advance,
            all_experts=source.all_experts,
        )
        weights = {outcome.name: outcome.rounded.weight for outcome in outcomes}
        variant = replace(with_outcomes(plan, recipe, outcomes), weights=weights)
        return _with_head(variant, source, recipe, grids, advance)


class Smoothed:
    """SmoothQuant: divides inputs that a preceding tensor can take the division for, then rounds to nearest."""

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe."""

    def quantize(self, source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
        """As `Quantizer.quantize`."""
        groups, parameters = source.description.groups, source.search.parameters
        largest = largest_inputs(source.model, groups, source.samples, all_experts=source.all_experts)
        scales = smoothed_groups(groups, parameters, grids, largest, recipe.smoothing)
        divisors = row_divisors(scales, parameters)

        weights: dict[str, QWeight] = {}
        for group in groups:
            weights |= quantize_groups(source.search, [group], grids, scales, divisors, clip=False)
            advance(_weights_of(source.search, group, grids))
        details = {"smoothed": f"{len(scales)} of {len(groups)} groups, alpha {recipe.smoothing:g}"}
        floats = dict(sorted(folded_floats(scales, parameters, grids).items()))
        variant = replace(plan, weights=weights, floats=floats, details={**plan.details, **details})
        return _with_head(variant, source, recipe, grids, advance)


class External:
    """Another tool, whose matrices become a variant of the same form as all others."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a tool that is not installed."""
        installed_tool(recipe.method)

    def quantize(self, source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
        """As `Quantizer.quantize`."""
        tool = installed_tool(recipe.method)
        integers = {name: grid for name, grid in grids.items() if isinstance(grid, Grid)}  # a recipe has no others
        job = ToolJob(source.model, source.search.parameters, integers, recipe.algorithm, source.samples)
        with torch.inference_mode(mode=False):
            matrices = tool.quantize(job)

        # what is on no grid of ours is stored as the values that it comes to
        values = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, Values)}
        return Variant(
            key=plan.key,
            weights={name: matrix for name, matrix in matrices.items() if isinstance(matrix, QWeight)},
            floats={name: matrix.values for name, matrix in values.items()},
            input_scales={},
            kept=plan.kept,
            details={"made by": f"{tool.distribution} {tool_version(recipe.method)}"},
            stored=tuple(StoredMatrix(name, m.values.numel(), m.form, m.size_bits) for name, m in values.items()),
        )


class Unquantized:
    """Leaves the weights in float, for recipes of keys and values alone."""

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe."""

    def quantize(self, source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
        """Return the plan, which holds no matrix."""
        return plan


QUANTIZERS: Mapping[Rounding, Quantizer] = {
    "nearest": Nearest(),
    "sequential": Sequential(),
    "smoothed": Smoothed(),
    "external": External(),
    "none": Unquantized(),
}


@torch.inference_mode()
def quantize_plan(source: Source, recipe: Recipe, grids: Grids, plan: Variant, advance: Advance) -> Variant:
    """Return the variant of a plan, by the quantizer that the recipe's method names; see `Quantizer.quantize`."""
    return QUANTIZERS[recipe.quant_method.rounding].quantize(source, recipe, grids, plan, advance)


def rounding_units(recipe: Recipe, plan: Variant) -> int:
    """Return what `quantize_plan` tells its progress in all: the weights, twice where they are scaled first."""
    return rounding_units_of(recipe, sum(weight.codes.numel() for weight in plan.weights.values()))


def rounding_units_of(recipe: Recipe, weights: int) -> int:
    """Return what so many weights count in `rounding_units`."""
    return weights * (2 if recipe.quant_method.scales_inputs else 1)


class RoundedGroups(NamedTuple):
    """Groups of linears after rounding.

    `weights`: the quantized matrices. `scales`: AWQ's, by group. `floats`: the float tensors that took the scales.
    `unseen`: the groups, by their first names, that no calibration token reached. `expert_tokens`: the calibration
    tokens that reached each expert's inner matrix, by its name.
    """

    weights: dict[str, QWeight]
    scales: Mapping[str, Scaled]
    floats: dict[str, torch.Tensor]
    unseen: list[str]
    expert_tokens: dict[str, int]


def quantize_alone(
    search: Search, groups: Sequence[Group], recipe: Recipe, grids: Grids, advance: Advance
) -> RoundedGroups:
    """Quantize groups, whole layers of them, for the inputs that the float model gives them.

    Args:
        search: The weights, the statistics of their inputs, and what was searched before.
        groups: Every group of one layer or of several.
        recipe: Whether scales and clips are searched.
        grids: The grid of every weight that is quantized.
        advance: Called with the weights of each group when its scales are searched, where a method has them, and when
            it is rounded.
    """
    scales: dict[str, Scaled] = {}
    for group in groups if recipe.quant_method.scales_inputs else ():
        scales |= search.scales([group], grids, fold_only=recipe.fold_only)
        advance(_weights_of(search, group, grids))

    # rows that take a scale are divided before they are rounded
    divisors = row_divisors(scales, search.parameters)
    weights: dict[str, QWeight] = {}
    for group in groups:
        weights |= quantize_groups(search, [group], grids, scales, divisors, clip=recipe.clips)
        advance(_weights_of(search, group, grids))

    unseen = [group.names[0] for group in groups if group.names[0] not in search.statistics]
    experts = [group.names[0] for group in groups if group.is_one_expert and recipe.needs_statistics]
    tokens = {name: search.statistics[name].tokens if name in search.statistics else 0 for name in experts}
    return RoundedGroups(weights, scales, folded_floats(scales, search.parameters, grids), unseen, tokens)


def _weights_of(search: Search, group: Group, grids: Grids) -> int:
    return sum(search.parameters[name].numel() for name in group.names if name in grids)


def with_floats(plan: Variant, recipe: Recipe, parts: Sequence[RoundedGroups]) -> Variant:
    """Return a plan with the float tensors and the input scales of all its groups, which come in parts."""
    scales = {name: scaled for part in parts for name, scaled in part.scales.items()}
    floats = dict(sorted((name, value) for part in parts for name, value in part.floats.items()))
    details = dict(plan.details)

    if recipe.quant_method.scales_inputs:
        explicit = sum(scaled.fold is None for scaled in scales.values())
        details["input scales"] = f"{len(scales)} groups scaled, {explicit} of them on the input explicitly"
        details |= _unseen_details([name for part in parts for name in part.unseen])
    tokens = by_stack({name: count for part in parts for name, count in part.expert_tokens.items()})
    return replace(plan, floats=floats, input_scales=explicit_scales(scales), details=details, expert_tokens=tokens)


def with_outcomes(plan: Variant, recipe: Recipe, outcomes: Sequence[RoundedMatrix]) -> Variant:
    """Return a plan with what GPTQ decided, and the tokens that it saw of each expert."""
    tokens = {outcome.name: outcome.tokens for outcome in outcomes if outcome.tokens is not None}
    details = {**plan.details, **gptq_details(recipe, outcomes)}
    return replace(plan, details=details, expert_tokens=by_stack(tokens))


def by_stack(counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return counts of experts' matrices by their stack, in the order of the experts; one not counted has 0."""
    stacks: dict[str, dict[int, int]] = {}
    for name, count in counts.items():
        stacks.setdefault(stack_of(name), {})[expert_of(name)] = count
    return {stack: tuple(found.get(index, 0) for index in range(max(found) + 1)) for stack, found in stacks.items()}


def _with_head(variant: Variant, source: Source, recipe: Recipe, grids: Grids, advance: Advance) -> Variant:
    """Return a variant with the head rounded to nearest, where it has a grid."""
    name = source.description.head
    if name not in grids:
        return variant
    head = quantize_rtn(source.head.weight.float(), grids[name])
    advance(rounding_units_of(recipe, head.codes.numel()))
    return replace(variant, weights={**variant.weights, name: head})


def gptq_options(recipe: Recipe) -> Options:
    """Return how GPTQ rounds by a recipe."""
    return Options(recipe.damping_share, recipe.orders_by_moment, recipe.clips)


def gptq_details(recipe: Recipe, outcomes: Sequence[RoundedMatrix]) -> dict[str, str]:
    """Return what GPTQ decided, and what it gained on the calibration text, in words."""
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
    } | _unseen_details([outcome.name for outcome in outcomes if not outcome.is_seen])


def _unseen_details(names: Sequence[str]) -> dict[str, str]:
    """Return a line on the experts that no calibration token was routed to; none where all were reached."""
    experts = [name for name in names if is_expert(name)]
    if not experts:
        return {}
    listed = ", ".join(experts[:_NAMED_AT_MOST]) + (" ..." if len(experts) > _NAMED_AT_MOST else "")
    return {"rounded plainly, no token reached them": f"{len(experts)}: {listed}"}
