"""From a recipe and a model to a variant; every weight of the model is accounted for."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase
from typing import Any

import torch

from qeval.config import Recipe
from qeval.errors import UsageError
from qeval.methods import FLOAT_REASONS
from qeval.models.structure.graph import Description
from qeval.models.structure.head import Head
from qeval.models.structure.weight_views import stack_of, weights_of
from qeval.progress import Advance
from qeval.quant.grid import FLOAT, FloatGrid, PerBlock, WeightGrid, parse
from qeval.quant.qweight import QWeight, check_fits
from qeval.quant.variant import LEFT_IN_FLOAT, FloatWeight, Variant
from qeval.quantize.context import InMemory, Source
from qeval.quantize.mix import MixedGrids, mix_grids, mixed_budget
from qeval.quantize.mix_formats import format_budget, free_names, mix_formats
from qeval.quantize.quantizers import QUANTIZERS, quantize_plan
from qeval.quantize.scaling import Parameters, Search

_MOST_SMALL = 0.05
"""The share of the linears' weights that may stay in float since a block is larger than a row."""


def source_of(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    statistics: Mapping[str, Any],
    float_bits: int | None = None,
    *,
    all_experts: bool = False,
) -> Source:
    """Return a source over `model`; a tied head is listed under its own name too.

    Args:
        model: A transformers model.
        description: Its structure.
        head: Its output projection.
        samples: Token ids of the calibration text; empty where none is needed.
        statistics: Of every layer's input, by group; empty where none are needed.
        float_bits: Of a weight in the checkpoint; None for those of the head as the model holds it.
        all_experts: Whether each expert is calibrated on every token.
    """
    parameters = weights_of(model)
    parameters[description.head] = head.weight
    trials = InMemory(model, description, head, samples)
    bits = float_bits or head.weight.dtype.itemsize * 8
    search = Search(parameters, dict(statistics))
    return Source(model, description, head, samples, search, trials, bits, all_experts)


@torch.inference_mode()
def build_variant(source: Source, recipe: Recipe, key: str, advance: Advance) -> Variant:
    """Return the variant of a recipe.

    Args:
        source: The model, with the calibration that the recipe needs.
        recipe: What to make.
        key: The identity of the variant.
        advance: Called with `trial_units` in all, then with `rounding_units`.

    Raises:
        UsageError: A block is larger than a row, no choice meets the budget, or a rule matches nothing.
    """
    grids, plan = plan_variant(source, recipe, key, advance)
    return quantize_plan(source, recipe, grids, plan, advance)


def plan_variant(source: Source, recipe: Recipe, key: str, advance: Advance) -> tuple[dict[str, WeightGrid], Variant]:
    """Return the grids of a recipe, and its variant before any number is known: its matrices are on the meta device.

    Args:
        source: The model, with the calibration that the recipe needs.
        recipe: What to make.
        key: The identity of the variant.
        advance: Called with `trial_units` in all.

    Raises:
        UsageError: As `build_variant`.
    """
    grids, kept = assign_grids(source, recipe)
    choice = MixedGrids(grids, (), {})
    if recipe.quant_method.mixes:
        mix = mix_formats if recipe.formats else mix_grids
        choice = mix(source, recipe, grids, advance)
    kept = _with_left(source, kept, grids.keys() - choice.grids.keys())
    grids = choice.grids

    # the linears in the order of the computation, the head last
    names = [*quantizable(source.description), source.description.head]
    weights = {name: _meta_weight(source.search.parameters[name], grids[name]) for name in names if name in grids}
    return grids, Variant(key, weights, {}, {}, kept, choice.choices, _details(recipe) | choice.details)


def possible_grids(source: Source, recipe: Recipe) -> dict[str, tuple[WeightGrid, ...]]:
    """Return the grids that each quantized weight may come out on: one, or those that a mix chooses among.

    What `build_variant` would refuse is refused here, before any calibration.

    Raises:
        UsageError: As `build_variant`.
    """
    method = recipe.quant_method
    QUANTIZERS[method.rounding].check(recipe)
    grids, _ = assign_grids(source, recipe)
    if not method.mixes:
        return {name: (grid,) for name, grid in grids.items()}
    if recipe.formats:
        format_budget(source, recipe, grids)
        candidates = tuple(map(parse, recipe.trial_grids))
        free = free_names(source, recipe, grids)
        return {name: candidates if name in free else (grid,) for name, grid in grids.items()}
    mixed_budget(source, recipe, grids)
    return {name: (grid, recipe.high_grid) for name, grid in grids.items()}


def quantizable(description: Description) -> list[str]:
    """Return the names of all linears in decoder layers, in the order of the computation."""
    return [name for group in description.groups for name in group.names]


def assign_grids(source: Source, recipe: Recipe) -> tuple[dict[str, WeightGrid], tuple[FloatWeight, ...]]:
    """Return the grid of every quantized weight, and every other weight with its reason.

    Raises:
        UsageError: A rule matches nothing, a block is larger than a row, or nothing is quantized.
    """
    inside = set(quantizable(source.description))
    _check_rules(recipe, source.search.parameters)
    small = small_matrices(source, recipe)

    grids: dict[str, WeightGrid] = {}
    kept = []
    in_float = recipe.quant_method.rounding == "none"
    for name, parameter in source.search.parameters.items():
        rule = recipe.rule_for(name)
        reason = _reason(source, recipe, name, parameter.shape, name in inside and not in_float, rule)
        if in_float and name in inside:
            reason = LEFT_IN_FLOAT
        elif name in small:
            reason = FLOAT_REASONS["small"]
        if reason is not None:
            kept.append(FloatWeight(name, parameter.numel(), reason))
            continue
        grids[name] = recipe.low_grid if rule is None else recipe.rule_grid(rule)
        check_fits(name, parameter.shape[1], grids[name])

    # a tied head that stays in float is the embedding, which is listed already
    head = source.description.head
    if source.description.tied and head not in grids:
        kept = [each for each in kept if each.name != head]
    if not grids and not in_float:
        raise UsageError(f"'{recipe.name}' leaves every weight in float; there is nothing to compare.")
    return grids, tuple(kept)


def small_matrices(source: Source, recipe: Recipe) -> frozenset[str]:
    """Return the linears that stay in float since their rows are shorter than a block of the recipe's grids.

    None where they are many: then the block is wrong, and `check_fits` says so. What a rule gives a grid of its own is
    never one.
    """
    if recipe.quant_method.rounding == "none":
        return frozenset()
    parameters = source.search.parameters
    sizes = [grid.granularity.size for grid in recipe_grids(recipe) if isinstance(grid.granularity, PerBlock)]
    names = [name for name in quantizable(source.description) if recipe.rule_for(name) is None]
    small = {name for name in names if parameters[name].shape[1] < max(sizes, default=0)}
    few = sum(parameters[name].numel() for name in small) <= _MOST_SMALL * sum(parameters[n].numel() for n in names)
    return frozenset(small if few else ())


def recipe_grids(recipe: Recipe) -> list[WeightGrid]:
    """Return every grid that a recipe may give a weight that no rule names."""
    if recipe.formats:
        return [parse(name) for name in recipe.trial_grids]
    return [recipe.low_grid, recipe.high_grid] if recipe.quant_method.mixes else [recipe.low_grid]


def _with_left(source: Source, kept: tuple[FloatWeight, ...], left: AbstractSet[str]) -> tuple[FloatWeight, ...]:
    """Return the weights that stay in float with those that a mix left there, in the model's order."""
    parameters = source.search.parameters
    added = [FloatWeight(name, parameters[name].numel(), "the mix leaves it in float") for name in left]
    order = {name: place for place, name in enumerate(parameters)}
    return tuple(sorted((*kept, *added), key=lambda each: order[each.name])) if added else kept


def _reason(
    source: Source, recipe: Recipe, name: str, shape: Sequence[int], inside: bool, rule: str | None
) -> str | None:
    """Return why a weight stays in float, or None when it is quantized."""
    description = source.description
    if rule == FLOAT:
        return "the recipe's rules leave it in float"
    if inside:
        return None
    kind = description.float_kinds.get(name) or description.float_kinds.get(stack_of(name))
    if kind is not None:
        return FLOAT_REASONS[kind]
    if name == description.head:
        wanted = recipe.quantize_head or rule is not None
        return None if wanted else "the head stays in float unless --quantize-head"
    if name == description.embedding:
        tied = ", tied with the head" if description.tied else ""
        return f"the embedding is looked up, not multiplied{tied}"
    is_vector = sum(size > 1 for size in shape) < 2 or name.endswith("bias")  # experts' biases lie in one tensor
    return "not a matrix (a norm's gain or a bias)" if is_vector else "not a linear layer of a decoder layer"


def _check_rules(recipe: Recipe, parameters: Parameters) -> None:
    for rule in recipe.rules:
        if not any(fnmatchcase(name, rule.match) for name in parameters):
            raise UsageError(f"'{recipe.name}': the rule '{rule.match}' matches no weight of this model.")


def _meta_weight(parameter: torch.Tensor, grid: WeightGrid) -> QWeight:
    """Return a quantized matrix of the shapes that `parameter` takes on `grid`, without numbers."""
    rows, columns = parameter.shape
    shape = grid.scale_shape(rows, columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
    zeros = None if grid.symmetric else torch.empty(shape, dtype=torch.uint8, device="meta")
    has_global = isinstance(grid, FloatGrid) and grid.has_global_scale
    global_scale = torch.empty(1, 1, device="meta") if has_global else None
    return QWeight(grid, codes, torch.empty(shape, device="meta"), zeros, global_scale)


def _details(recipe: Recipe) -> dict[str, str]:
    if recipe.quant_method.rounding == "none":
        return {}
    details = {"clip search": "per block" if recipe.clips else "none"}
    if recipe.quantize_head:
        details["head"] = "rounded to nearest"
    blocks = any(isinstance(grid.granularity, PerBlock) for grid in recipe_grids(recipe))
    details["short blocks"] = "a width that the block does not divide ends in a short block" if blocks else "none"
    return details
