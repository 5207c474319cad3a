"""The mixed-precision choice against every possible choice, and the positional rule against its published figures."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult

from qeval.errors import QevalError, UsageError
from qeval.quant.mixed import WidthOption, choose_high, positional_layers, positional_names

options = st.lists(
    st.builds(
        lambda low, extra, kl: WidthOption(low, low + extra, kl, kl / 256),
        st.integers(1, 50),
        st.integers(1, 50),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=8,
)


def total_kl(chosen, picks):
    return sum(o.high_kl if high else o.low_kl for o, high in zip(chosen, picks, strict=True))


def total_bits(chosen, picks):
    return sum(o.high_bits if high else o.low_bits for o, high in zip(chosen, picks, strict=True))


@given(chosen=options, share=st.floats(0, 1))
@settings(deadline=None, max_examples=80)
def test_no_other_choice_within_the_budget_is_better(chosen, share):
    smallest, largest = total_bits(chosen, [False] * len(chosen)), total_bits(chosen, [True] * len(chosen))
    budget = int(smallest + share * (largest - smallest))
    picks = choose_high(chosen, budget)
    assert total_bits(chosen, picks) <= budget
    best = min(
        total_kl(chosen, other)
        for other in itertools.product([False, True], repeat=len(chosen))
        if total_bits(chosen, other) <= budget
    )
    assert total_kl(chosen, picks) == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("budget", "side"), [(9, "below the smallest"), (41, "above the largest")])
def test_a_budget_out_of_reach_is_refused(budget, side):
    with pytest.raises(UsageError, match=side):
        choose_high([WidthOption(10, 40, 1.0, 0.0)], budget)


def test_groups_that_cost_nothing_more_are_chosen_between_all_the_same():
    assert choose_high([WidthOption(10, 10, 1.0, 1.0), WidthOption(20, 20, 0.0, 0.0)], 30) in ([False] * 2, [True] * 2)


def test_a_solver_that_gives_up_is_a_failure_in_a_sentence(monkeypatch):
    ended = OptimizeResult(success=False, message="Time limit reached.\n(HiGHS Status 13)", x=None)
    monkeypatch.setattr("qeval.quant.mixed.milp", lambda *_, **__: ended)
    with pytest.raises(QevalError, match=r"found no widths .* \(Time limit reached. \(HiGHS Status 13\)\); mix by"):
        choose_high([WidthOption(10, 40, 1.0, 0.0)], 20)


def test_positional_layers_of_30_are_those_of_the_reference():
    """The list that Model Optimizer 0.47 gave for the 30 layers of SmolLM2-135M."""
    assert sorted(positional_layers(30)) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]


def test_positional_names_are_v_and_down():
    names = [
        f"model.layers.{i}.{p}.weight"
        for i in range(8)
        for p in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    found = positional_names(names, 8)
    assert "model.layers.0.self_attn.v_proj.weight" in found
    assert "model.layers.7.mlp.down_proj.weight" in found
    assert not any("q_proj" in name for name in found)


def test_what_a_layer_multiplies_by_last_stands_for_them_where_neither_is_named():
    names = [f"h.{i}.{p}.weight" for i in range(9) for p in ("attn.c_attn", "mlp.c_proj")]
    last = {i: (f"h.{i}.mlp.c_proj.weight",) for i in range(9)}
    found = positional_names(names, 9, last)
    assert found == {f"h.{i}.mlp.c_proj.weight" for i in positional_layers(9)}
    experts = [f"model.layers.0.mlp.experts.down_proj[{i}]" for i in range(3)]
    assert positional_names([*experts, "model.layers.0.mlp.experts.gate_up_proj[0]"], 1, last) == set(experts)


def test_a_model_without_such_linears_is_told_so():
    with pytest.raises(UsageError, match="importance measured"):
        positional_names(["h.0.attn.in_proj.weight"], 4)
