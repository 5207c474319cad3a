"""The spread of each method's KL over calibration: its variance over texts, seeds and windows, and which ranks hold.

A cell is one comparison, calibrated on one draw of one text. All cells of a model score the same windows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from qeval.report import formatting
from qeval.report.document import NOTHING, Table, TableCell
from qeval.report.run_rows import PairedRun
from qeval.stats.bootstrap import Floats
from qeval.stats.nested import MOST_DRAWS, draws_to_decide, nested_variances
from qeval.store.run import VariantRecord

Spreads = Mapping[str, Floats]
"""By variant the KL of each window in nats, [texts, seeds, windows]."""


@dataclass(frozen=True)
class CalibrationCell:
    """One comparison of a sweep over calibration: its model, text, seed and folder."""

    model: str
    text: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class MethodSpread:
    """One variant's KL over the cells of a model, in nats: its mean, its ends, and the roots of its variances."""

    model: str
    variant: str
    mean: float
    least: float
    most: float
    text_sd: float | None
    seed_sd: float | None
    residual_sd: float | None


@dataclass(frozen=True)
class RankDecision:
    """Two variants that follow one another in KL, by their paired difference over cells, in nats.

    `seeds`: how many seeds a text would decide their order; None where `MOST_DRAWS` would not, or there is one alone.
    """

    model: str
    better: str
    other: str
    difference: float
    seeds: int | None
    is_decided: bool


@dataclass(frozen=True)
class CalibrationSpread:
    """The spread of every calibrated variant of every model."""

    texts: tuple[str, ...]
    seeds: int
    methods: tuple[MethodSpread, ...]
    decisions: tuple[RankDecision, ...]
    unmoved: tuple[str, ...]
    """Variants whose KL is the same in all cells: nothing of them is calibrated, or all draws show the same."""


def measure_spread(cells: Sequence[CalibrationCell]) -> CalibrationSpread:
    """Return the spread over the cells of each model; every cell must be a finished run.

    Raises:
        UsageError, BrokenRecordError: A cell holds no whole run.
    """
    texts, seeds = tuple(dict.fromkeys(cell.text for cell in cells)), len({cell.seed for cell in cells})
    methods: list[MethodSpread] = []
    decisions: list[RankDecision] = []
    unmoved: list[str] = []
    for model in dict.fromkeys(cell.model for cell in cells):
        spreads = _spreads([cell for cell in cells if cell.model == model], len(texts), seeds)
        moved = {name: kl for name, kl in spreads.items() if np.ptp(kl, axis=(0, 1)).any()}
        unmoved += [name for name in spreads if name not in moved]
        ranked = sorted(moved, key=lambda name: float(moved[name].mean()))
        methods += [_method(model, name, moved[name]) for name in ranked]
        decisions += [_decision(model, better, other, moved) for better, other in pairwise(ranked)]
    return CalibrationSpread(texts, seeds, tuple(methods), tuple(decisions), tuple(dict.fromkeys(unmoved)))


def spread_tables(spread: CalibrationSpread) -> list[Table]:
    """Return the variance table, and how many seeds decide each rank."""
    tables = [_variance_table(spread)] if spread.methods else []
    return [*tables, *([_decision_table(spread)] if spread.decisions else [])]


def spread_json(spread: CalibrationSpread) -> dict[str, Any]:
    """Return the spread as JSON holds it."""
    return {
        "texts": list(spread.texts),
        "seeds": spread.seeds,
        "methods": [vars(each) for each in spread.methods],
        "decisions": [vars(each) for each in spread.decisions],
        "unmoved": list(spread.unmoved),
    }


def _spreads(cells: Sequence[CalibrationCell], texts: int, seeds: int) -> Spreads:
    """Return the window KLs of the variants that every cell has, [texts, seeds, windows] each."""
    by_cell = [_window_kls(PairedRun(cell.folder)) for cell in cells]
    names = [name for name in by_cell[0] if all(name in each for each in by_cell)]
    return {name: np.array([each[name] for each in by_cell]).reshape(texts, seeds, -1) for name in names}


def _window_kls(run: PairedRun) -> dict[str, Floats]:
    return {variant.name: _means(run, variant) for variant in run.done if variant.role == "variant"}


def _means(run: PairedRun, variant: VariantRecord) -> Floats:
    """Return the mean KL of each window."""
    rows = run.tokens(variant)
    windows = rows.by_window("kl_nats")
    return windows.sums(rows.of("kl_nats")) / windows.sizes()


def _method(model: str, name: str, kl: Floats) -> MethodSpread:
    cells, parts = kl.mean(2), nested_variances(kl)
    roots = [None if part is None else sqrt(part) for part in (parts.groups, parts.draws, parts.residual)]
    return MethodSpread(model, name, float(cells.mean()), float(cells.min()), float(cells.max()), *roots)


def _decision(model: str, better: str, other: str, kls: Spreads) -> RankDecision:
    """Return whether and by how many seeds the order of two is decided; both are paired on the same draws."""
    differences = kls[other].mean(2) - kls[better].mean(2)
    draws = differences.shape[1]
    seeds = draws_to_decide(differences) if draws > 1 else None
    is_decided = seeds is not None and seeds <= draws
    return RankDecision(model, better, other, float(differences.mean()), seeds, is_decided)


def _variance_table(spread: CalibrationSpread) -> Table:
    rows = tuple(
        (
            TableCell(each.model),
            TableCell(each.variant),
            _number(each.mean),
            TableCell(f"{each.least:.4g} to {each.most:.4g}"),
            *(_number(sd) for sd in (each.text_sd, each.seed_sd, each.residual_sd)),
        )
        for each in spread.methods
    )
    columns = ("Model", "Variant", "Mean KL, nats", "Lowest to highest", "SD, text", "SD, seed", "SD, residual")
    unmoved = (
        f" The same in all cells, as nothing of them is calibrated or all draws show the same: "
        f"{', '.join(spread.unmoved)}."
    )
    note = (
        f"{len(spread.texts)} texts ({', '.join(spread.texts)}) by {spread.seeds} seeds; a seed draws which parts of "
        "the text are calibrated on. Each SD is the root of a variance component of one cell's KL: of texts, of seeds "
        "within a text, and of the windows (what a draw changes on some windows and not on others)."
        f"{unmoved if spread.unmoved else ''}"
    )
    return Table("How far calibration moves the KL", columns, rows, note)


def _decision_table(spread: CalibrationSpread) -> Table:
    rows = tuple(
        (
            TableCell(each.model),
            TableCell(f"{each.better} before {each.other}"),
            TableCell(f"{each.difference:.4g}"),
            TableCell("yes" if each.is_decided else "no"),
            TableCell(
                str(each.seeds) if each.seeds else (f"over {MOST_DRAWS}" if spread.seeds > 1 else formatting.MISSING)
            ),
        )
        for each in spread.decisions
    )
    columns = ("Model", "Order", "Difference, nats", "Decided", "Seeds a text that decide it")
    note = (
        "Paired on the same draws, over these texts: Student's t at 95 %, were the difference and its spread over "
        "seeds the true ones."
    )
    return Table("Which ranks calibration leaves standing", columns, rows, note)


def _number(value: float | None) -> TableCell:
    return NOTHING if value is None else TableCell(f"{value:.3g}")
