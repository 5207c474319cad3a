"""Choose one format for each group of linears, so that the summed KL is least under a budget of bits.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, *Knapsack Problems*, chapter 11), solved in three
steps. A greedy walk along each group's lower convex hull, the steepest step first, gives a choice that fits, and a
bound that no choice can pass; the two are at most one step apart (Sinha, Zoltners, 1979). What a step costs where the
walk ends is the price of a bit. At that price an option that loses more than the gap between choice and bound is in no
better choice; the few that are left are combined group after group, and partial choices that another one beats are
dropped.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qeval.errors import UsageError

MOST_STATES = 1 << 15
"""Partial choices that are held at a time; the best are kept where there are more."""
_ROUNDING = 1e-12
"""Share of the largest KL by which sums of the same numbers may differ."""


class FormatOption(NamedTuple):
    """One group in one format: bits on disk, and mean KL (nats) with the group alone in it."""

    bits: int
    kl: float


class _Walk(NamedTuple):
    """A choice that fits (places by group), the nats that a bit is worth where it ends, and how far off a bound is."""

    picks: list[int]
    price: float
    gap: float


def choose_formats(groups: Sequence[Sequence[FormatOption]], budget_bits: int) -> list[int]:
    """Choose one option for each group, so that the summed KL is least under a budget; return the options' places.

    No choice within the budget has a lower sum, unless more than `MOST_STATES` partial choices were in play: then the
    sum is above the least one by no more than a single step of a single group. An option is never chosen where another
    one of its group takes no more bits and has no higher KL.

    Args:
        groups: The options of every group.
        budget_bits: What all groups may take on disk together.

    Raises:
        UsageError: The budget is below the smallest or above the largest possible size.
    """
    smallest, largest = (sum(pick(o.bits for o in options) for options in groups) for pick in (min, max))
    check_budget(budget_bits, smallest, largest)
    places = [_undominated(options) for options in groups]
    best = [[options[place] for place in kept] for options, kept in zip(groups, places, strict=True)]
    walk = _walk(best, budget_bits)
    combined = _combine(best, budget_bits, walk)
    picks = min((walk.picks, combined), key=partial(_total_kl, best)) if combined else walk.picks
    return [kept[pick] for kept, pick in zip(places, picks, strict=True)]


def _total_kl(groups: Sequence[Sequence[FormatOption]], picks: Sequence[int]) -> float:
    return sum(options[pick].kl for options, pick in zip(groups, picks, strict=True))


def check_budget(budget_bits: int, smallest: int, largest: int) -> None:
    """Refuse a budget that no choice meets, or that every choice is below.

    Raises:
        UsageError: The budget is below the smallest or above the largest possible size.
    """
    if not smallest <= budget_bits <= largest:
        side = "below the smallest" if budget_bits < smallest else "above the largest"
        raise UsageError(f"The budget of {budget_bits} bits is {side} possible size ({smallest} to {largest} bits).")


def _undominated(options: Sequence[FormatOption]) -> list[int]:
    """Return the places of the options that no other one of as few bits equals or betters in KL, by rising bits."""
    places: list[int] = []
    for place in sorted(range(len(options)), key=lambda at: (*options[at], at)):
        if not places or options[place].kl < options[places[-1]].kl:
            places.append(place)
    return places


def _hull(options: Sequence[FormatOption]) -> list[int]:
    """Return the places of the lower convex hull of options by rising bits and falling KL."""
    hull: list[int] = []
    for place in range(len(options)):
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) <= _slope(options, hull[-2], place):
            hull.pop()
        hull.append(place)
    return hull


def _slope(options: Sequence[FormatOption], start: int, stop: int) -> float:
    """Return the nats that each further bit saves between two options."""
    return (options[start].kl - options[stop].kl) / (options[stop].bits - options[start].bits)


def _walk(groups: Sequence[Sequence[FormatOption]], budget_bits: int) -> _Walk:
    """Take the steepest steps of all hulls while they fit; where one doesn't, no further one of its group is taken."""
    hulls = [_hull(options) for options in groups]
    steps = [
        (_slope(options, start, stop), group, start, stop)
        for group, (options, hull) in enumerate(zip(groups, hulls, strict=True))
        for start, stop in pairwise(hull)
    ]
    picks, spare = [0] * len(groups), budget_bits - sum(options[0].bits for options in groups)
    price = gap = 0.0
    for slope, group, start, stop in sorted(steps, key=lambda step: -step[0]):
        bits = groups[group][stop].bits - groups[group][start].bits
        if picks[group] == start and bits <= spare:
            picks[group], spare = stop, spare - bits
            gap -= slope * bits if price else 0.0
        elif not price:  # the first step that doesn't fit: what is unspent would buy a part of it, in the bound
            price, gap = slope, slope * spare
    return _Walk(picks, price, gap)


def _combine(groups: Sequence[Sequence[FormatOption]], budget_bits: int, walk: _Walk) -> list[int] | None:
    """Return the choice with the least KL among those that may be better than the walk's; None where none is.

    A state is a partial choice: its bits, and its KL above what its bits are worth at the walk's price, `losses`.
    """
    if walk.gap <= 0:
        return None
    scale = max(option.kl for options in groups for option in options)
    limit = walk.gap + _ROUNDING * scale * len(groups)
    bits, losses = np.zeros(1, np.int64), np.zeros(1)
    parents: list[NDArray[np.int64]] = []
    choices: list[NDArray[np.int64]] = []
    left = sum(options[0].bits for options in groups)
    for options in groups:
        left -= options[0].bits
        values = np.array([option.kl + walk.price * option.bits for option in options])
        values -= values.min()
        kept = np.flatnonzero(values <= limit)
        added = np.array([options[int(place)].bits for place in kept], np.int64)

        # each state with each option; those that don't fit, or lose more than the gap, are out
        all_bits = (bits[:, None] + added).ravel()
        all_losses = (losses[:, None] + values[kept]).ravel()
        alive = np.flatnonzero((all_bits + left <= budget_bits) & (all_losses <= limit))
        alive = alive[_pareto(all_bits[alive], all_losses[alive] - walk.price * all_bits[alive])]
        if len(alive) > MOST_STATES:
            alive = alive[np.argsort(all_losses[alive], kind="stable")[:MOST_STATES]]
        bits, losses = all_bits[alive], all_losses[alive]
        parents.append(alive // len(kept))
        choices.append(kept[alive % len(kept)])
    if not len(bits):
        return None
    state = int(np.argmin(losses - walk.price * bits))
    picks = []
    for parent, choice in zip(reversed(parents), reversed(choices), strict=True):
        picks.append(int(choice[state]))
        state = int(parent[state])
    return picks[::-1]


def _pareto(bits: NDArray[np.int64], kls: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of the states that no other one of as few bits equals or betters in KL, by rising bits."""
    order = np.lexsort((kls, bits))
    before = np.minimum.accumulate(np.concatenate(([np.inf], kls[order])))[:-1]
    return order[kls[order] < before]
