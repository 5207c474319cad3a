"""Variance components of figures that were measured once for each draw, draws nested in groups, on the same windows.

The groups are texts and the draws are seeds: seed 1 of one text has nothing to do with seed 1 of another. Windows are
crossed with all draws, since each draw is measured on the same ones, so what a draw adds to some windows and not to
others is the residual. Estimated by the mean squares of a nested analysis of variance with random effects (as in
S. Searle, G. Casella and C. McCulloch, Variance Components, 1992, chapters 3 and 4).
"""

from dataclasses import dataclass
from math import sqrt

from qeval.stats.bootstrap import LEVEL, Floats
from qeval.stats.closed import critical

MOST_DRAWS = 1000


@dataclass(frozen=True)
class NestedVariances:
    """Variances of one draw's mean: of groups, of draws within a group, and of the windows' residual.

    `groups` is None with one group, `draws` with one draw a group: then what draws add stands in `groups`. `residual`
    is None with one window.
    """

    groups: float | None
    draws: float | None
    residual: float | None


def nested_variances(values: Floats) -> NestedVariances:
    """Return the variance components of figures [groups, draws, windows]; an estimate below zero is zero.

    >>> import numpy as np
    >>> nested_variances(np.array([[[1.0, 3.0], [2.0, 4.0]]]))
    NestedVariances(groups=None, draws=0.5, residual=0.0)
    """
    groups, draws, windows = values.shape
    cells = values.mean(2)
    centred = values - cells[..., None] - values.mean((0, 1)) + values.mean()
    residual = None
    if windows > 1 and groups * draws > 1:
        residual = float((centred**2).sum()) / ((groups * draws - 1) * (windows - 1)) / windows
    noise = residual or 0.0

    # mean squares of cell means: each holds the components below it
    of_draws = float(cells.var(1, ddof=1).mean()) if draws > 1 else None
    drawn = None if of_draws is None else max(of_draws - noise, 0.0)
    of_groups = None
    if groups > 1:
        below = noise if of_draws is None else of_draws
        of_groups = max(float(cells.mean(1).var(ddof=1)) - below / draws, 0.0)
    return NestedVariances(of_groups, drawn, residual)


def draws_to_decide(differences: Floats) -> int | None:
    """Return how many draws a group would tell the mean of paired differences from zero, were it and its spread true.

    Args:
        differences: One a draw, [groups, draws], two draws a group at least.

    Returns:
        The smallest such number, two at least, by Student's t at 95 %; None where a thousand would not do.
    """
    groups = len(differences)
    error, mean = sqrt(float(differences.var(1, ddof=1).mean())), abs(float(differences.mean()))
    for draws in range(2, MOST_DRAWS + 1):
        reach = critical((1 + LEVEL) / 2, groups * (draws - 1)) * error / sqrt(groups * draws)
        if reach < mean:
            return draws
    return None
