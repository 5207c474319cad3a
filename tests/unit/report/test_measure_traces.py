"""Metrics along traces against what they stand for: simulated chains, and calls that can all be counted."""

from itertools import product

import numpy as np
import pytest

from qeval.gate.trace_figures import trace_figure
from qeval.report.measure_grammar import baseline_grammar, grammar_metrics
from qeval.report.measure_reasoning import baseline_reasoning, reasoning_items, reasoning_metrics
from qeval.report.trace_rows import TraceRows
from qeval.report.traces import weak_baseline_notes

NAN = float("nan")


def rows_of(traces, ended=None):
    """Rows from, for each trace, its item and its pieces' rows as (piece, matches, values)."""
    flat = [(item, draw, *row) for draw, (item, rows) in enumerate(traces) for row in rows]
    columns = ("log_p", "kl_nats", "stop_p", "doubt_p", "leak_p")
    return TraceRows(
        items=np.array([row[0] for row in flat]),
        draws=np.array([row[1] for row in flat]),
        pieces=np.array([row[2] for row in flat], np.object_),
        tokens=np.arange(len(flat)),
        matches=np.array([row[3] for row in flat]),
        values={name: np.array([row[4].get(name, NAN) for row in flat], np.float64) for name in columns},
        ended=np.array([True] * len(traces) if ended is None else ended),
    )


def chain_rows(hazards, *, right=True, shift=1.0, doubt=0.1):
    chain = [
        ("chain", True, {"log_p": -0.5, "kl_nats": 0.1 * place, "stop_p": shift * hazard, "doubt_p": doubt})
        for place, hazard in enumerate(hazards)
    ]
    numbers = {"kl_nats": 5.0, "stop_p": 0.0, "doubt_p": 0.5}
    answer = [("answer", right, numbers | {"log_p": -1.0 * shift}), ("answer", True, numbers | {"log_p": -2.0})]
    return [*chain, *answer, ("after", True, numbers)]


HAZARDS = ([0.1, 0.2, 0.6], [0.0, 0.5], [0.3] * 6)


@pytest.fixture(scope="module")
def chains():
    base = rows_of([(item, chain_rows(hazards)) for item, hazards in enumerate(HAZARDS)], [True, True, False])
    rights = (True, False, True)
    own = [(item, chain_rows(h, right=rights[item], shift=0.5, doubt=0.2)) for item, h in enumerate(HAZARDS)]
    return rows_of(own, [True, True, False]), base


def test_length_and_going_on_are_those_of_sampled_chains(chains):
    """Of 40,000 sampled chains each: the mean number of tokens up to the stop, and the share that never stops."""
    generator, items = np.random.default_rng(0), reasoning_items(chains[0])
    for place, hazards in enumerate(HAZARDS):
        stops = generator.random((40_000, len(hazards))) < 0.5 * np.array(hazards)
        lengths = np.where(stops.any(1), stops.argmax(1) + 1, len(hazards))
        assert items.length[place] == pytest.approx(lengths.mean(), abs=0.03)
        assert items.unfinished[place] == pytest.approx((~stops.any(1)).mean(), abs=0.01)


def test_the_chain_alone_counts_for_kl_and_doubt_and_the_answer_for_itself(chains):
    own, base = chains
    metrics = reasoning_metrics(own, base, 0)
    kl = [0.1 * place for hazards in HAZARDS for place in range(len(hazards))]
    assert metrics["reasoning_kl_nats"].value == pytest.approx(np.mean(kl))
    assert metrics["reasoning_kl_nats"].clusters == 3
    assert metrics["reasoning_answer_nll_diff"].value == pytest.approx(-0.5)
    assert metrics["reasoning_acc"].value == pytest.approx(2 / 3)
    assert metrics["reasoning_acc_diff"].value == pytest.approx(-1 / 3)
    assert metrics["reasoning_flips"].value == pytest.approx(1 / 3)
    assert metrics["reasoning_doubt_ratio"].value == pytest.approx(2.0)
    assert metrics["reasoning_length_ratio"].value > 1
    assert metrics["reasoning_unfinished"].n == 2  # of chains that ended
    assert metrics["reasoning_unfinished_diff"].value > 0


def test_the_baseline_beside_itself_changes_nothing(chains):
    same = reasoning_metrics(chains[1], chains[1], 0)
    assert all(same[name].value == 0 for name in same if name.endswith("_diff"))
    assert same["reasoning_length_ratio"].value == same["reasoning_doubt_ratio"].value == 1
    own = baseline_reasoning(chains[1], 0)
    assert own["reasoning_doubt"].value == pytest.approx(0.1)
    assert set(own) == {"reasoning_answer_nll", "reasoning_acc", "reasoning_unfinished", "reasoning_doubt"}


def test_without_markers_of_doubt_or_ends_nothing_is_said_of_them():
    rows = rows_of([(item, chain_rows([0.1, 0.2], doubt=NAN)) for item in range(3)], [False] * 3)
    assert not [name for name in reasoning_metrics(rows, rows, 0) if "doubt" in name or "unfinished" in name]


def test_numbers_that_are_not_finite_break_the_variant_and_its_figures(chains):
    bad = rows_of([(item, chain_rows([0.1, NAN])) for item in range(3)])
    metrics = reasoning_metrics(bad, chains[1], 0)
    assert metrics["reasoning_kl_nats"].non_finite == 3
    assert metrics["reasoning_kl_nats"].value is None
    with pytest.raises(ValueError, match="3"):
        trace_figure("reasoning_flips", bad, chains[1])


def test_gated_figures_are_the_reports_numbers(chains):
    metrics = reasoning_metrics(*chains, 0)
    for name, sign in (("reasoning_kl_nats", 1), ("reasoning_flips", 1), ("reasoning_answer_nll_diff", 1)):
        assert trace_figure(name, *chains).value == pytest.approx(sign * metrics[name].value)
    drop = trace_figure("reasoning_acc_drop", *chains)
    assert drop.value == pytest.approx(-metrics["reasoning_acc_diff"].value)
    assert "1 lost and 0 won" in drop.detail


# Calls of two tokens, each of four: what is valid is written down, and so is the distribution of both models.
VALID = {0: (0, 1), 1: (2,)}
"""The first tokens that are valid, and the second ones behind each."""


def tables(seed):
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(4)), generator.dirichlet(np.ones(4), 4)


def valid_probability(first, second):
    return sum(first[a] * second[a, b] for a, b in product(range(4), repeat=2) if a in VALID and b in VALID[a])


def call_rows(call, first, second):
    a, b = call
    leaks = 1 - first[list(VALID)].sum(), 1 - second[a, list(VALID[a])].sum()
    numbers = zip(leaks, (np.log(first[a]), np.log(second[a, b])), strict=True)
    return [("call", True, {"leak_p": leak, "log_p": log_p}) for leak, log_p in numbers]


@pytest.fixture(scope="module")
def calls():
    """4,000 calls that a model draws among valid tokens, and the rows of it and of another along them."""
    (first, second), other, generator = tables(1), tables(2), np.random.default_rng(3)
    drawn = []
    for _ in range(4000):
        a = generator.choice(list(VALID), p=first[list(VALID)] / first[list(VALID)].sum())
        b = generator.choice(VALID[a], p=second[a, list(VALID[a])] / second[a, list(VALID[a])].sum())
        drawn.append((int(a), int(b)))
    base = rows_of([(item, call_rows(call, first, second)) for item, call in enumerate(drawn)])
    own = rows_of([(item, call_rows(call, *other)) for item, call in enumerate(drawn)])
    return own, base


def test_the_mean_product_is_the_baselines_probability_of_a_valid_call(calls):
    metric = baseline_grammar(calls[1], 0)["grammar_valid"]
    assert metric.low - 0.002 < valid_probability(*tables(1)) < metric.high + 0.002
    assert metric.high - metric.low < 0.02


def test_weighted_calls_give_the_variants_own_probability(calls):
    metrics = grammar_metrics(*calls, 0)
    own = metrics["grammar_valid_own"]
    assert own.low < valid_probability(*tables(2)) < own.high
    assert own.high - own.low < 0.1
    # along the baseline's calls it is another number, with what the variant's steps let through
    drawn = [(1 - a) * (1 - b) for a, b in calls[0].values["leak_p"].reshape(-1, 2)]
    assert metrics["grammar_valid"].value == pytest.approx(np.mean(drawn))
    difference = metrics["grammar_valid"].value - baseline_grammar(calls[1], 0)["grammar_valid"].value
    assert metrics["grammar_valid_diff"].value == pytest.approx(difference)
    assert trace_figure("grammar_valid_drop", *calls).value == pytest.approx(-difference)
    assert trace_figure("grammar_leak", *calls).value == pytest.approx(metrics["grammar_leak"].value)


def test_a_call_that_is_cut_is_not_valid():
    first, second = tables(1)
    cut = rows_of([(item, call_rows((0, 1), first, second)) for item in range(4)], [True, False, True, False])
    whole = rows_of([(item, call_rows((0, 1), first, second)) for item in range(4)])
    half, full = (baseline_grammar(rows, 0)["grammar_valid"].value for rows in (cut, whole))
    assert half == pytest.approx(full / 2)


def test_a_baseline_that_is_seldom_right_is_told():
    first, second = tables(1)
    good = rows_of([(item, call_rows((0, 1), first, second)) for item in range(4)])
    cut = rows_of([(item, call_rows((0, 1), first, second)) for item in range(4)], [False] * 4)
    assert weak_baseline_notes(baseline_grammar(good, 0)) == []
    (note,) = weak_baseline_notes(baseline_grammar(cut, 0))
    assert "the baseline's calls are seldom valid (0" in note
    wrong = rows_of([(item, chain_rows([0.1], right=False)) for item in range(3)])
    (note,) = weak_baseline_notes(baseline_reasoning(wrong, 0))
    assert "the baseline has none of 3 answers right" in note


def test_calls_of_one_prompt_are_one_cluster():
    first, second = tables(1)
    rows = rows_of([(place // 3, call_rows((0, 1), first, second)) for place in range(9)])
    assert grammar_metrics(rows, rows, 0)["grammar_valid"].clusters == 3
    assert trace_figure("grammar_valid_drop", rows, rows).clusters == "prompts"
