"""`sensitivity`: every group of one model measured alone and left out, each figure kept as soon as it is there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from qeval.compare.loading import source_of_model, tell_warnings
from qeval.compare.plan import calibration_of
from qeval.compare.schemes import refuse_rotations, refuse_schemes
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.compare.variants import Workshop, check_recipes, variant_key
from qeval.config import Recipe
from qeval.errors import BrokenRecordError, UsageError
from qeval.files.atomic import write_text
from qeval.identity import digest
from qeval.progress import Progress
from qeval.quant.candidates import CANDIDATE_MARK
from qeval.quant.grid import FloatGrid, WeightGrid
from qeval.quantize.ablation import Attribution, KlBySample, attribute, quantized_groups
from qeval.quantize.build import assign_grids
from qeval.quantize.context import Source
from qeval.quantize.mix import effective_of, mixed_budget, size_limits, under_budget
from qeval.quantize.mix_formats import format_budget, format_limits
from qeval.quantize.sensitivity import EVERY, SENSITIVITY_LENGTH, SENSITIVITY_SAMPLES, finite_kls
from qeval.recipe_checks import UNNAMED_GRID
from qeval.report.privacy import local_name
from qeval.report.sensitivity import FormatKls, GroupEffect, Pick, Sensitivities
from qeval.stats.bootstrap import Clusters
from qeval.stats.estimates import means, ratio
from qeval.store.seal import has_valid_seal, parse_object, seal
from qeval.types import Estimate

MEASURED = "measured.json"
MEASURED_VERSION = 2
_SIZES = 5
"""Budgets that are tried where none is given: evenly from the smallest to the largest size, both left out."""


def measure_sensitivity(
    model: ModelChoice,
    recipe: Recipe,
    calibration: CalibrationChoice,
    budgets: Sequence[float],
    out: Path,
    *,
    formats: Sequence[str] = (),
    measured_on: int,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> Sensitivities:
    """Measure every group's KL alone and left out, under `recipe` (rtn or awq), and what a mix would pick at each size.

    `measured_on` so many calibration sequences. A mix picks among `formats`; without them, the method's grid or INT8.
    What was measured is in OUT/measured.json after each figure; the same command goes on from there.

    Raises:
        UsageError: a method whose groups are not made one by one, a budget that no choice meets, or too few sequences.
        BrokenRecordError: measured.json is torn.
    """
    if not recipe.quant_method.mixed:
        raise UsageError(f"--method {recipe.name}: groups are quantized one by one by rtn and awq alone.")
    refuse_schemes({recipe.name: recipe.scheme}, "qeval sensitivity measures")
    refuse_rotations([recipe], {}, "qeval sensitivity measures")
    if threads:
        torch.set_num_threads(threads)
    if budgets and not formats and isinstance(recipe.low_grid, FloatGrid):
        raise UsageError(
            f"--budgets chooses between widths of integers, and {recipe.name} is on {recipe.low_grid}; name --formats "
            "to choose among, such as int4-g128/nvfp4/bf16."
        )
    mix_recipe = _mixed(recipe, formats, None) if formats else None  # refused before the model is read
    loaded, model_source = source_of_model(model)
    tell_warnings(loaded, progress)
    check_recipes([recipe], model_source, calibration.samples)
    text = calibration_of(calibration, loaded)
    if len(text.samples) < measured_on:
        raise UsageError(
            f"--measured-samples {measured_on}: the calibration has {len(text.samples)} sequences; "
            "raise --calibration-samples, or measure on fewer."
        )
    workshop = Workshop(model_source, lambda: text, seed, progress)
    source = workshop.calibrated_source(recipe)
    low, _ = assign_grids(source, recipe)
    mix: _Mix = _FormatMix(workshop, source, mix_recipe) if mix_recipe else _WidthMix(source, recipe, low)
    sizes = mix.sizes(budgets)  # refused before the long measurement, not after
    key = digest(
        {
            "variant": variant_key(recipe, model_source, text, seed),
            "config": model_source.config_sha256,
            "tokens": text.record["tokens_sha256"],
            "how": [measured_on, SENSITIVITY_LENGTH, EVERY],
        }
    )
    attribution = _attributed(source, recipe, low, measured_on, _FigureStore(out / MEASURED, key), progress)
    picks, kls = mix.picks(sizes, attribution)
    return Sensitivities(
        model=local_name(model.name, loaded.info.source),
        method=recipe.name,
        calibration=str(text.record["source"]),
        sequences=measured_on,
        positions=measured_on * len(range(0, min(SENSITIVITY_LENGTH, len(source.samples[0])), EVERY)),
        joint=_in_nats([attribution.joint], seed)[0],
        additivity=_additivity(attribution, seed),
        groups=_effects(source, attribution, seed),
        picks=tuple(picks),
        by_format=kls,
    )


class _FigureStore:
    """Figures by name in a file, written whole after each; those of another key are begun anew."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.figures: dict[str, KlBySample] = {}
        if path.exists():
            self._read()

    def add(self, name: str, kl: KlBySample) -> None:
        self.figures[name] = kl
        content = {"measured_version": MEASURED_VERSION, "key": self._key, "kl_nats": self.figures}
        write_text(self._path, json.dumps(seal(json.loads(json.dumps(content, allow_nan=False))), indent=1) + "\n")

    def _read(self) -> None:
        try:
            data = parse_object(self._path.read_bytes())
            if not has_valid_seal(data):
                raise BrokenRecordError(
                    f"{self._path} has no checksum that fits it: it was changed, or is an older qeval's; remove it, "
                    "and the same command begins anew."
                )
            if data["key"] == self._key:
                self.figures = {str(name): tuple(map(float, kl)) for name, kl in data["kl_nats"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenRecordError(f"{self._path} is torn; remove it, and the same command begins anew.") from error


def _attributed(
    source: Source, recipe: Recipe, low: dict[str, WeightGrid], count: int, store: _FigureStore, progress: Progress
) -> Attribution:
    effective, samples = effective_of(source, recipe, low), source.samples[:count]
    units = len(source.description.units)

    def keep(name: str, kl: KlBySample) -> None:
        finite_kls(recipe.name, {name: sum(kl)})
        store.add(name, kl)

    with progress.phase(f"quantize {units} groups", units) as advance:
        quantized = quantized_groups(source.description, effective, advance)
    with progress.phase(f"sensitivity of {len(quantized)} groups", 2 * len(quantized) + 1) as advance:
        return attribute(
            source.model, source.description, source.head, samples, quantized, store.figures, keep, advance
        )


def _effects(source: Source, attribution: Attribution, seed: int) -> tuple[GroupEffect, ...]:
    """Return each measured group's figures, resampled by sequence; savings are paired with the joint KL."""
    parameters, joint = source.search.parameters, np.array(attribution.joint)
    groups = [group for group in source.description.units if group.names[0] in attribution.alone]
    alone = [attribution.alone[group.names[0]] for group in groups]
    without = [attribution.without[group.names[0]] for group in groups]
    saved = [joint - kl for kl in without]
    estimates = [_in_nats(columns, seed) for columns in (alone, without, saved)]
    return tuple(
        GroupEffect(
            group.layer, group.kind, group.names, sum(parameters[name].numel() for name in group.names), *figures
        )
        for group, *figures in zip(groups, *estimates, strict=True)
    )


def _in_nats(columns: Sequence[ArrayLike], seed: int) -> list[Estimate]:
    clusters = Clusters.single_rows(len(np.asarray(columns[0])))
    return means(columns, clusters, unit="nats", better="lower", seed=seed)


def _additivity(attribution: Attribution, seed: int) -> Estimate:
    """Return the sum of the single KLs over the joint one, both resampled together; no value where nothing was lost."""
    total, joint = np.sum(list(attribution.alone.values()), axis=0), np.array(attribution.joint)
    return ratio(total, joint, n=len(joint), unit="ratio", better="neither", seed=seed)


def _mixed(recipe: Recipe, formats: Sequence[str], budget: float | None) -> Recipe:
    """Return the mixed recipe of a method: of formats, or of its grid and INT8."""
    method, words = recipe.quant_method.mixed, CANDIDATE_MARK.join(formats)
    name = f"{method}:{words}" + ("" if budget is None else f"{'-' if words else ''}{budget:g}bpw")
    grid = UNNAMED_GRID if formats else recipe.grid
    return Recipe(
        name, method, grid, formats=tuple(formats), clip=recipe.clip, fold_only=recipe.fold_only, budget=budget
    )


class _Mix(Protocol):
    """A way to mix: the sizes that it can have, and what it would pick at each."""

    def sizes(self, asked: Sequence[float]) -> list[float]:
        """Return the budgets asked for in bits per weight, each found possible, or evenly spaced ones.

        Raises:
            UsageError: No choice meets one of them.
        """

    def picks(self, sizes: Sequence[float], attribution: Attribution) -> tuple[list[Pick], tuple[FormatKls, ...]]:
        """Return what it picks at each size, and the KLs alone in each format that this rests on, if there are any."""


@dataclass(frozen=True, eq=False)
class _WidthMix:
    """A mix of a method's own grid, `low` by weight, and INT8."""

    source: Source
    recipe: Recipe
    low: dict[str, WeightGrid]

    def sizes(self, asked: Sequence[float]) -> list[float]:
        """Return the sizes; none where the method's grid has 8 bits already, or is one of floats."""
        if isinstance(self.recipe.low_grid, FloatGrid):
            return []  # only the groups' figures are of interest
        for budget in asked:
            mixed_budget(self.source, _mixed(self.recipe, (), budget), self.low)
        mixed = _mixed(self.recipe, (), 8.0)
        if asked or self.recipe.low_grid.bits >= mixed.high_grid.bits:
            return list(asked)
        return _evenly(*size_limits(self.source, mixed, self.low))

    def picks(self, sizes: Sequence[float], attribution: Attribution) -> tuple[list[Pick], tuple[FormatKls, ...]]:
        """Choose by the sequences that a mixed method itself measures on, so that it would pick the same."""
        kls = {name: fmean(figure[:SENSITIVITY_SAMPLES]) for name, figure in attribution.alone.items()}
        return [self._pick(size, kls) for size in sizes], ()

    def _pick(self, budget: float, kls: dict[str, float]) -> Pick:
        mixed, parameters = _mixed(self.recipe, (), budget), self.source.search.parameters
        limit = mixed_budget(self.source, mixed, self.low)
        grids, choices = under_budget(self.source, mixed, self.low, limit, kls)
        bits = sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items())
        low_bits = self.recipe.low_grid.bits
        chosen = [choice for choice in choices if choice.bits > low_bits]
        predicted = sum((c.kl_high if c.bits > low_bits else c.kl_low) or 0.0 for c in choices)
        weights = sum(parameters[name].numel() for name in grids)
        return Pick(budget, bits / weights, predicted, tuple((choice.layer, choice.kind) for choice in chosen))


@dataclass(frozen=True, eq=False)
class _FormatMix:
    """A mix of several formats: it measures each group alone in each, or finds that a mix has done so before."""

    workshop: Workshop
    source: Source
    recipe: Recipe

    def sizes(self, asked: Sequence[float]) -> list[float]:
        """Return the sizes."""
        low, _ = assign_grids(self.source, self.recipe)
        for budget in asked:
            format_budget(self.source, self._at(budget), low)
        return list(asked) or _evenly(*format_limits(self.source, self.recipe, low))

    def picks(self, sizes: Sequence[float], attribution: Attribution) -> tuple[list[Pick], tuple[FormatKls, ...]]:
        """Plan the mixed recipe of each size."""
        plans = [self.workshop.outline(self.source, self._at(size))[1] for size in sizes]
        picks = []
        for size, plan in zip(sizes, plans, strict=True):
            places = {
                name: tuple((choice.layer, choice.kind) for choice in plan.choices if choice.format == name)
                for name in self.recipe.candidates
            }
            predicted = sum(choice.kls.get(str(choice.format), 0.0) for choice in plan.choices)
            picks.append(Pick(size, plan.bits_per_weight, predicted, (), places))
        return picks, tuple(FormatKls(each.layer, each.kind, dict(each.kls)) for each in plans[0].choices)

    def _at(self, budget: float) -> Recipe:
        return replace(self.recipe, name=f"{self.recipe.name}-{budget:g}bpw", budget=budget)


def _evenly(smallest: float, largest: float) -> list[float]:
    """Return sizes evenly between two, both left out."""
    step = (largest - smallest) / (_SIZES + 1)
    return [round(smallest + step * place, 2) for place in range(1, _SIZES + 1)]
