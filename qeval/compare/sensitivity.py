"""`sensitivity`: every group of one model measured alone and left out, each figure kept as soon as it is there."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from qeval.calibrate.attribution import Attribution, attribute
from qeval.calibrate.build import assign
from qeval.calibrate.mix import effective_of, high_grid, mixed_budget, under_budget
from qeval.calibrate.sensitivity import EVERY, LENGTH, SAMPLES, tokens
from qeval.calibrate.source import Source
from qeval.compare.prepare import calibration_of, source_of_model
from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.compare.variants import Workshop, check_recipes, variant_key
from qeval.config import Recipe
from qeval.errors import BrokenRecordError, UsageError
from qeval.identity import digest
from qeval.progress import Progress
from qeval.quant.grid import Grid, parse
from qeval.report.sensitivity import GroupEffect, Pick, Sensitivities
from qeval.store.atomic import write_text

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
    threads: int | None,
    seed: int,
    progress: Progress,
) -> Sensitivities:
    """Every group's KL alone and left out, under `recipe` (rtn or awq), and what a mix would pick at each size.

    What was measured is in OUT/measured.json after each figure; the same command goes on from there.

    Raises:
        UsageError: a method whose groups are not made one by one, or a budget that no choice meets.
        BrokenRecordError: measured.json is torn.
    """
    if recipe.method not in ("rtn", "awq"):
        raise UsageError(f"--method {recipe.name}: groups are quantized one by one by rtn and awq alone.")
    if threads:
        torch.set_num_threads(threads)
    loaded, model_source = source_of_model(model)
    for warning in loaded.warnings:
        progress.warn(warning)
    check_recipes([recipe], model_source)
    seen = calibration_of(calibration, loaded)
    source = Workshop(model_source, lambda: seen, seed, progress).calibrated_source(recipe)
    low, _ = assign(source, recipe, parse(recipe.grid))
    sizes = _budgets(source, recipe, low, budgets)  # refused before the long measurement, not after
    key = digest(
        {
            "variant": variant_key(recipe, model_source, seen, seed),
            "config": model_source.config_sha256,
            "tokens": seen.record["tokens_sha256"],
            "how": [SAMPLES, LENGTH, EVERY],
        }
    )
    found = _attributed(source, recipe, low, _Kept(out / MEASURED, key), progress)
    return Sensitivities(
        model=model.name,
        method=recipe.name,
        calibration=str(seen.record["source"]),
        positions=len(source.samples[:SAMPLES]) * len(range(0, tokens(source.model, source.samples).shape[1], EVERY)),
        joint_kl_nats=found.joint,
        groups=_effects(source, found),
        picks=tuple(_pick(source, recipe, low, size, found) for size in sizes),
    )


class _Kept:
    """Figures by name in a file, written whole after each; those of another key are begun anew."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.found: dict[str, float] = {}
        if path.exists():
            self._read()

    def add(self, name: str, kl: float) -> None:
        self.found[name] = kl
        write_text(self._path, json.dumps({"key": self._key, "kl_nats": self.found}, indent=1, allow_nan=False) + "\n")

    def _read(self) -> None:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            if data["key"] == self._key:
                self.found = {str(name): float(kl) for name, kl in data["kl_nats"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenRecordError(f"{self._path} is torn; remove it, and the same command begins anew.") from error


def _attributed(source: Source, recipe: Recipe, low: dict[str, Grid], kept: _Kept, progress: Progress) -> Attribution:
    effective = effective_of(source, recipe, low)
    count = len(source.description.units)
    with progress.phase(f"sensitivity of {count} groups", 2 * count + 1) as advance:
        return attribute(
            source.model, source.description, source.head, source.samples, effective, kept.found, kept.add, advance
        )


def _effects(source: Source, found: Attribution) -> tuple[GroupEffect, ...]:
    parameters = source.search.parameters
    return tuple(
        GroupEffect(
            group.layer,
            group.kind,
            group.names,
            sum(parameters[name].numel() for name in group.names),
            found.alone[group.names[0]],
            found.without[group.names[0]],
        )
        for group in source.description.units
        if group.names[0] in found.alone
    )


def _mixed(recipe: Recipe, budget: float) -> Recipe:
    method = "mixed" if recipe.method == "awq" else "mixed-rtn"
    return Recipe(f"{method}:{budget:g}bpw", method, recipe.grid, clip=recipe.clip, budget=budget)


def _budgets(source: Source, recipe: Recipe, low: dict[str, Grid], asked: Sequence[float]) -> list[float]:
    """The budgets asked for, each found possible, or evenly spaced ones."""
    if asked:
        for budget in asked:
            mixed_budget(source, _mixed(recipe, budget), low)
        return list(asked)
    parameters = source.search.parameters
    weights = sum(parameters[name].numel() for name in low)
    high = high_grid(_mixed(recipe, 8.0))
    ends = [
        sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items()) / weights
        for grids in (low, dict.fromkeys(low, high))
    ]
    if ends[0] >= ends[1]:
        return []  # the method's own width is the high one: there is nothing to mix
    step = (ends[1] - ends[0]) / (_SIZES + 1)
    return [round(ends[0] + step * place, 2) for place in range(1, _SIZES + 1)]


def _pick(source: Source, recipe: Recipe, low: dict[str, Grid], budget: float, found: Attribution) -> Pick:
    mixed = _mixed(recipe, budget)
    grids, choices = under_budget(source, mixed, low, mixed_budget(source, mixed, low), found.alone)
    parameters = source.search.parameters
    bits = sum(grid.size_bits(*parameters[name].shape) for name, grid in grids.items())
    low_bits = parse(recipe.grid).bits
    chosen = [choice for choice in choices if choice.bits > low_bits]
    predicted = sum((c.kl_high if c.bits > low_bits else c.kl_low) or 0.0 for c in choices)
    weights = sum(parameters[name].numel() for name in grids)
    return Pick(budget, bits / weights, predicted, tuple((choice.layer, choice.kind) for choice in chosen))
