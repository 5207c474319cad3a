"""Tests on paired right-or-wrong answers, and the correction that scanning many of them needs."""

from collections.abc import Sequence

from scipy import special


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: of the answers that flipped, did more flip one way?

    Source: Q. McNemar, Psychometrika 12 (1947), in its exact binomial form. Without a flip there is nothing to
    tell apart: 1. Heads and tails are equally likely, so both tails are twice the smaller one.

    >>> mcnemar(9, 1)
    0.021484375
    """
    fewer, flips = min(right_to_wrong, wrong_to_right), right_to_wrong + wrong_to_right
    return min(1.0, 2 * float(special.bdtr(fewer, flips, 0.5))) if flips else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's step-down correction, in their order: each is compared with the level itself.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest, left = [0.0] * len(p_values), 0.0, len(p_values)
    for place in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        largest = max(largest, min(1.0, left * p_values[place]))
        adjusted[place], left = largest, left - 1
    return adjusted
