"""`sensitivity`: every group of one model measured alone and left out, each figure kept as soon as it is there."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import ArrayLike

from qeval.calibrate.attribution import Attribution, Figure, attribute, quantized_groups
from qeval.calibrate.build import assign
from qeval.calibrate.mix import effective_of, high_grid, mixed_budget, size_limits, under_budget
from qeval.calibrate.sensitivity import EVERY, LENGTH, SAMPLES, finite
from qeval.calibrate.source import Source
from qeval.compare.prepare import calibration_of, source_of_model, tell_warnings
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.compare.variants import Workshop, check_recipes, variant_key
from qeval.config import Recipe
from qeval.errors import BrokenRecordError, UsageError
from qeval.identity import digest
from qeval.paths import check_place
from qeval.progress import Progress
from qeval.quant.grid import Grid, parse
from qeval.report.sensitivity import GroupEffect, Pick, Sensitivities
from qeval.stats.bootstrap import Clusters
from qeval.stats.estimates import means, ratio
from qeval.store.atomic import write_text
from qeval.types import Estimate

MEASURED = "measured.json"
_SIZES = 5
"""Budgets that are tried where none is given: evenly from the smallest to the largest size, both left out."""


def measure_sensitivity(
    model: ModelChoice,
    recipe: Recipe,
    calibration: CalibrationChoice,
    budgets: Sequence[float],
    out: Path,
    *,
    measured_on: int,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> Sensitivities:
    """Every group's KL alone and left out, under `recipe` (rtn or awq), and what a mix would pick at each size.

    `measured_on` so many calibration sequences. What was measured is in OUT/measured.json after each figure; the same
    command goes on from there.

    Raises:
        UsageError: a method whose groups are not made one by one, a budget that no choice meets, or too few sequences.
        BrokenRecordError: measured.json is torn.
    """
    if recipe.method not in ("rtn", "awq"):
        raise UsageError(f"--method {recipe.name}: groups are quantized one by one by rtn and awq alone.")
    check_place(out, "the maps")
    if threads:
        torch.set_num_threads(threads)
    loaded, model_source = source_of_model(model)
    tell_warnings(loaded, progress)
    check_recipes([recipe], model_source, calibration.samples)
    seen = calibration_of(calibration, loaded)
    if len(seen.samples) < measured_on:
        raise UsageError(
            f"--measured-samples {measured_on}: the calibration has {len(seen.samples)} sequences; "
            "raise --calibration-samples, or measure on fewer."
        )
    source = Workshop(model_source, lambda: seen, seed, progress).calibrated_source(recipe)
    low, _ = assign(source, recipe, parse(recipe.grid))
    sizes = _budgets(source, recipe, low, budgets)  # refused before the long measurement, not after
    key = digest(
        {
            "variant": variant_key(recipe, model_source, seen, seed),
            "config": model_source.config_sha256,
            "tokens": seen.record["tokens_sha256"],
            "how": [measured_on, LENGTH, EVERY],
        }
    )
    found = _attributed(source, recipe, low, measured_on, _Kept(out / MEASURED, key), progress)
    return Sensitivities(
        model=model.name,
        method=recipe.name,
        calibration=str(seen.record["source"]),
        sequences=measured_on,
        positions=measured_on * len(range(0, min(LENGTH, len(source.samples[0])), EVERY)),
        joint=_in_nats([found.joint], seed)[0],
        additivity=_additivity(found, seed),
        groups=_effects(source, found, seed),
        picks=tuple(_pick(source, recipe, low, size, found) for size in sizes),
    )


class _Kept:
    """Figures by name in a file, written whole after each; those of another key are begun anew."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.found: dict[str, Figure] = {}
        if path.exists():
            self._read()

    def add(self, name: str, kl: Figure) -> None:
        self.found[name] = kl
        write_text(self._path, json.dumps({"key": self._key, "kl_nats": self.found}, indent=1, allow_nan=False) + "\n")

    def _read(self) -> None:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            if data["key"] == self._key:
                self.found = {str(name): tuple(map(float, kl)) for name, kl in data["kl_nats"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenRecordError(f"{self._path} is torn; remove it, and the same command begins anew.") from error


def _attributed(
    source: Source, recipe: Recipe, low: dict[str, Grid], count: int, kept: _Kept, progress: Progress
) -> Attribution:
    effective, samples = effective_of(source, recipe, low), source.samples[:count]
    units = len(source.description.units)

    def keep(name: str, kl: Figure) -> None:
        finite(recipe.name, {name: sum(kl)})
        kept.add(name, kl)

    with progress.phase(f"quantize {units} groups", units) as advance:
        quantized = quantized_groups(source.description, effective, advance)
    with progress.phase(f"sensitivity of {len(quantized)} groups", 2 * len(quantized) + 1) as advance:
        return attribute(source.model, source.description, source.head, samples, quantized, kept.found, keep, advance)


def _effects(source: Source, found: Attribution, seed: int) -> tuple[GroupEffect, ...]:
    """Each measured group's figures, resampled by sequence; what leaving it saves is paired with the joint KL."""
    parameters, joint = source.search.parameters, np.array(found.joint)
    groups = [group for group in source.description.units if group.names[0] in found.alone]
    alone = [found.alone[group.names[0]] for group in groups]
    without = [found.without[group.names[0]] for group in groups]
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


def _additivity(found: Attribution, seed: int) -> Estimate:
    """The sum of the single KLs over the joint one, both resampled together; no value where nothing was lost."""
    total, joint = np.sum(list(found.alone.values()), axis=0), np.array(found.joint)
    return ratio(total, joint, n=len(joint), unit="ratio", better="neither", seed=seed)


def _mixed(recipe: Recipe, budget: float) -> Recipe:
    method = "mixed" if recipe.method == "awq" else "mixed-rtn"
    return Recipe(f"{method}:{budget:g}bpw", method, recipe.grid, clip=recipe.clip, budget=budget)


def _budgets(source: Source, recipe: Recipe, low: dict[str, Grid], asked: Sequence[float]) -> list[float]:
    """The budgets asked for, each found possible, or evenly spaced ones."""
    if asked:
        for budget in asked:
            mixed_budget(source, _mixed(recipe, budget), low)
        return list(asked)
    mixed = _mixed(recipe, 8.0)
    if parse(recipe.grid).bits >= high_grid(mixed).bits:
        return []  # the method's own width is the high one: there is nothing to mix
    smallest, largest = size_limits(source, mixed, low)
    step = (largest - smallest) / (_SIZES + 1)
    return [round(smallest + step * place, 2) for place in range(1, _SIZES + 1)]


def _pick(source: Source, recipe: Recipe, low: dict[str, Grid], budget: float, found: Attribution) -> Pick:
    """By the sequences that a mixed method itself measures on, so that it would pick the same."""
    mixed, parameters = _mixed(recipe, budget), source.search.parameters
    kls = {name: fmean(figure[:SAMPLES]) for name, figure in found.alone.items()}
    grids, choices = under_budget(source, mixed, low, mixed_budget(source, mixed, low), kls)
    bits = sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items())
    low_bits = parse(recipe.grid).bits
    chosen = [choice for choice in choices if choice.bits > low_bits]
    predicted = sum((c.kl_high if c.bits > low_bits else c.kl_low) or 0.0 for c in choices)
    weights = sum(parameters[name].numel() for name in grids)
    return Pick(budget, bits / weights, predicted, tuple((choice.layer, choice.kind) for choice in chosen))
