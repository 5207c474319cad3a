"""What early stopping costs and saves, by simulation: false alarms under continuous looking, and rows used.

    python -m benchmarks.sequential

14,000 questions or 300 windows are drawn one after the other, and every test is looked at after each. At the margin
itself (where either claim is a false alarm, at most 5 % of the time each), at a clear distance (nothing lost, or
three times the margin), and close to it. The exit code is 1 where false alarms exceed the level by more than the
simulation's error, or where a clear case needs more than 15 % of the rows on average though a test of fixed size (level
and power 95 %) would not: where every 16th answer changes anyway, no test tells a drop of a point from none by then.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from qeval.stats.sequential import Decision, decide_bounded, decide_sums

ALPHA, MOST = 0.05, 0.15
QUESTIONS, WINDOWS, TOKENS = 14_000, 300, 1024
Floats = NDArray[np.float64]


class Rule(NamedTuple):
    """A rule with its margin, how rows are drawn around a true value, and how they are judged."""

    margin: float
    rows: int
    draw: Callable[[Generator, float], Floats]
    decide: Callable[[Floats], Decision | None]
    clear: tuple[float, float]


def flips(rng: Generator, rate: float) -> Floats:
    """Whether each answer flipped."""
    return (rng.random(QUESTIONS) < rate).astype(float)


def changes(discordant: float) -> Callable[[Generator, float], Floats]:
    """Right answers lost less won, of which `discordant` differ beside the drop itself."""

    def draw(rng: Generator, drop: float) -> Floats:
        drawn = rng.random(QUESTIONS)
        lost, won = discordant / 2 + max(drop, 0), discordant / 2
        return (drawn < lost).astype(float) - (drawn > 1 - won)

    return draw


def kl(rng: Generator, mean: float) -> Floats:
    """Sums over windows of heavy-tailed KL less the margin: lognormal, a window's level varying by 0.3."""
    level = np.exp(rng.normal(0, 0.3, WINDOWS) - 0.3**2 / 2)
    within = rng.normal(1, sqrt(np.exp(1.2**2) - 1) / sqrt(TOKENS), WINDOWS)
    return TOKENS * (mean * level * np.maximum(within, 0) - 0.05)


def nll(rng: Generator, mean: float) -> Floats:
    """Sums over windows of differences of NLL less the margin log 1.03; a window's own mean varies by 0.02."""
    return TOKENS * (mean + rng.normal(0, 0.02, WINDOWS) - np.log(1.03)) + sqrt(TOKENS) * rng.normal(0, 0.2, WINDOWS)


def tail(rng: Generator, share: float) -> Floats:
    """Tokens over the margin of a 99.9 % quantile less the 0.1 % allowed; their rate varies between windows."""
    rate = share * rng.gamma(2.0, 0.5, WINDOWS)
    return rng.binomial(TOKENS, np.minimum(rate, 1)) - 0.001 * TOKENS


def rules() -> dict[str, Rule]:
    """What is simulated."""

    def drop(values: Floats) -> Decision | None:
        return decide_bounded(values, 0.01, ALPHA, low=-1.0)

    def windows(values: Floats) -> Decision | None:
        return decide_sums(values, ALPHA, WINDOWS)

    return {
        "flips at most 4 %": Rule(0.04, QUESTIONS, flips, lambda v: decide_bounded(v, 0.04, ALPHA), (0.0, 0.12)),
        "drop at most 1 pt, 1 % change": Rule(0.01, QUESTIONS, changes(0.01), drop, (0.0, 0.03)),
        "drop at most 1 pt, 2 % change": Rule(0.01, QUESTIONS, changes(0.02), drop, (0.0, 0.03)),
        "drop at most 1 pt, 6 % change": Rule(0.01, QUESTIONS, changes(0.06), drop, (0.0, 0.03)),
        "mean KL at most 0.05": Rule(0.05, WINDOWS, kl, windows, (0.003, 0.15)),
        "perplexity by at most 3 %": Rule(float(np.log(1.03)), WINDOWS, nll, windows, (0.0, 3 * float(np.log(1.03)))),
        "p99.9 KL": Rule(
            0.001, WINDOWS, tail,
            lambda v: decide_sums(v, ALPHA, WINDOWS, least_variance=TOKENS * 0.001 * 0.999), (0.0, 0.003),
        ),
    }  # fmt: skip


def played(rule: Rule, truth: float, repeats: int, seed: int = 0) -> tuple[float, float, float]:
    """How often each side was claimed, and the mean share of the rows that were used."""
    rng = np.random.default_rng([seed, round(1e6 * truth)])
    found = [rule.decide(rule.draw(rng, truth)) for _ in range(repeats)]
    below = sum(each is not None and each.side == "below" for each in found) / repeats
    above = sum(each is not None and each.side == "above" for each in found) / repeats
    used = sum(rule.rows if each is None else each.after for each in found) / (repeats * rule.rows)
    return below, above, used


def fixed_share(rule: Rule, truth: float) -> float:
    """The share of the rows that a one-sided test of fixed size needs, at level and power 95 %."""
    values = np.concatenate([rule.draw(np.random.default_rng(seed), truth) for seed in range(20)])
    sums = rule.rows == WINDOWS  # then the margin is taken off already
    distance = values.mean() - (0 if sums else rule.margin)
    return float((2 * 1.645 * values.std() / distance) ** 2 / rule.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    asked = parser.parse_args(arguments)
    allowed = ALPHA + 2 * sqrt(ALPHA * (1 - ALPHA) / asked.repeats)
    missed = 0
    print(f"{'rule':<31}{'truth':>8}{'below':>8}{'above':>8}{'rows':>8}")
    for name, rule in rules().items():
        for truth in (rule.margin, *rule.clear):
            below, above, used = played(rule, truth, asked.repeats)
            at_margin = truth == rule.margin
            bad = max(below, above) > allowed if at_margin else used > MOST
            fixed = None if at_margin else fixed_share(rule, truth)
            missed += bad and (fixed is None or fixed <= MOST)
            said = ("FALSE ALARMS" if at_margin else "more than 15 %") if bad else ""
            said += f" (a fixed test needs {fixed:.1%})" if fixed is not None and bad else ""
            print(f"{name:<31}{truth:>8.4f}{below:>8.1%}{above:>8.1%}{used:>8.1%}  {said}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
