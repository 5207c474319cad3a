"""Figures along the baseline's chains of thought and calls of functions, with their bounds."""

from qeval.gate.figure import Figure, both_ways
from qeval.report.measure_grammar import call_numbers
from qeval.report.measure_reasoning import non_finite_reasoning, reasoning_items
from qeval.report.trace_rows import TraceRows
from qeval.stats import bounds
from qeval.stats.bootstrap import Clusters, NonFiniteError
from qeval.stats.bounds import Bounded

_CHAIN = "chain"


def trace_figure(name: str, rows: TraceRows, baseline: TraceRows) -> Figure:
    """Return a figure along traces.

    Args:
        name: The metric's.
        rows: The variant's rows.
        baseline: The baseline's along the same traces.

    Raises:
        NonFiniteError: Some of the variant's numbers are not finite; it counts them.
    """
    if name.startswith("grammar_"):
        return _of_calls(name, rows, baseline)
    if bad := non_finite_reasoning(rows):
        raise NonFiniteError(bad, len(rows.items))
    if name == "reasoning_kl_nats":
        chain = rows.pieces == _CHAIN
        bound: Bounded = bounds.mean_of(rows.values["kl_nats"][chain], Clusters.of(rows.items[chain]))
        return Figure(bound.value, bound, "tokens", "questions")

    own, base = reasoning_items(rows), reasoning_items(baseline)
    questions, detail = Clusters.single_rows(len(own.kl)), None
    if name == "reasoning_acc_drop":
        bound, detail = bounds.drop_of(base.is_right, own.is_right, questions), both_ways(base.is_right, own.is_right)
    elif name == "reasoning_flips":
        bound = bounds.share_of(own.is_right != base.is_right, questions)
    else:
        bound = bounds.mean_of(own.answer_nll - base.answer_nll, questions)
    return Figure(bound.value, bound, "questions", "questions", detail)


def _of_calls(name: str, rows: TraceRows, baseline: TraceRows) -> Figure:
    if bad := rows.non_finite("leak_p", "log_p"):
        raise NonFiniteError(bad, len(rows.items))
    if name == "grammar_leak":
        bound = bounds.mean_of(rows.values["leak_p"], Clusters.of(rows.items))
        return Figure(bound.value, bound, "tokens", "prompts", unchanged=float(baseline.values["leak_p"].mean()))
    change = call_numbers(baseline).valid - call_numbers(rows).valid
    bound = bounds.mean_of(change, Clusters.of(rows.items_of_traces))
    return Figure(bound.value, bound, "calls", "prompts")
