"""The choice of a format a group against every possible choice, and what it owes where it is no longer exact."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qeval.errors import UsageError
from qeval.quant import knapsack
from qeval.quant.knapsack import FormatOption, choose_formats

option = st.builds(
    FormatOption, st.integers(1, 40), st.one_of(st.just(0.0), st.floats(0, 1), st.sampled_from([1e-6, 0.25, 0.5]))
)
groups_of_formats = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def total(groups, picks):
    """The bits and the KL of a choice."""
    chosen = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    return sum(each.bits for each in chosen), sum(each.kl for each in chosen)


def range_of(groups):
    return tuple(sum(pick(each.bits for each in options) for options in groups) for pick in (min, max))


def least_kl(groups, budget):
    """The slow definition: every choice there is."""
    choices = itertools.product(*groups)
    return min(sum(each.kl for each in chosen) for chosen in choices if sum(each.bits for each in chosen) <= budget)


def many_groups(count, formats=(4.25, 4.5, 6.25, 8.25, 16)):
    """Groups of unequal sizes by formula; each option's KL falls with its bits, not always as fast."""
    return [
        [
            FormatOption(
                round(width * 1009 * (1 + group % 7)) + place, (1 + group * 13 % 11) * 4.0**-width * (1 + place % 2)
            )
            for place, width in enumerate(formats)
        ]
        for group in range(count)
    ]


@given(groups=groups_of_formats, share=st.floats(0, 1))
@settings(deadline=None, max_examples=300)
def test_no_choice_within_the_budget_is_better(groups, share):
    smallest, largest = range_of(groups)
    budget = int(smallest + share * (largest - smallest))
    bits, kl = total(groups, choose_formats(groups, budget))
    assert bits <= budget
    assert kl == pytest.approx(least_kl(groups, budget), rel=1e-9, abs=1e-12)


@given(groups=groups_of_formats)
@settings(deadline=None, max_examples=60)
def test_more_bits_never_cost_more(groups):
    smallest, largest = range_of(groups)
    kls = [total(groups, choose_formats(groups, budget))[1] for budget in range(smallest, largest + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(kls))
    assert kls[-1] == pytest.approx(sum(min(each.kl for each in options) for options in groups))


@given(groups=groups_of_formats, share=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_what_another_option_dominates_is_never_chosen(groups, share):
    smallest, largest = range_of(groups)
    picks = choose_formats(groups, int(smallest + share * (largest - smallest)))
    for options, pick in zip(groups, picks, strict=True):
        chosen = options[pick]
        assert not any(each.bits <= chosen.bits and each.kl < chosen.kl for each in options)
        assert not any(each.bits < chosen.bits and each.kl <= chosen.kl for each in options)


def test_two_hundred_groups_are_chosen_for_better_than_step_by_step():
    groups = many_groups(200)
    smallest, largest = range_of(groups)
    for share in (0.02, 0.1, 0.5):
        budget = int(smallest + share * (largest - smallest))
        bits, kl = total(groups, choose_formats(groups, budget))
        walk = knapsack._walk(groups, budget)
        assert bits <= budget
        assert total(groups, walk.picks)[1] - walk.gap - 1e-9 <= kl <= total(groups, walk.picks)[1]


def test_with_little_room_for_partial_choices_the_bound_holds(monkeypatch):
    groups = many_groups(60)
    smallest, largest = range_of(groups)
    budget = smallest + (largest - smallest) // 9
    best = total(groups, choose_formats(groups, budget))[1]
    monkeypatch.setattr(knapsack, "MOST_STATES", 2)
    bits, kl = total(groups, choose_formats(groups, budget))
    largest_step = max(options[0].kl - options[-1].kl for options in groups)
    assert bits <= budget
    assert best <= kl <= best + largest_step


@pytest.mark.parametrize(("budget", "side"), [(9, "below the smallest"), (41, "above the largest")])
def test_a_budget_out_of_reach_is_refused(budget, side):
    with pytest.raises(UsageError, match=rf"{side} possible size \(10 to 40 bits\)"):
        choose_formats([[FormatOption(10, 1.0), FormatOption(20, 0.5), FormatOption(40, 0.0)]], budget)
