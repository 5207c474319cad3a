"""From the rows along the baseline's calls of functions to metrics; every interval resamples prompts.

The baseline sampled its calls within the grammar, so that its product of (1 - leak) over a call is the probability that
the same model without a grammar would make that call, over the probability with it. The mean of the product is then the
probability of a valid call: importance sampling (D. G. Horvitz and D. J. Thompson, JASA 47, 1952). A call that reached
the limit of length counts as 0. A variant's product tells of the same along the baseline's calls; weighted by how much
likelier or less likely each call is to the variant, it is the variant's own probability.
"""

from typing import NamedTuple

import numpy as np

from qeval.report.measure_tokens import as_metrics
from qeval.report.model import Metric, Metrics
from qeval.report.trace_rows import TraceRows
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats
from qeval.types import Better

_KINDS: dict[str, tuple[str, Better]] = {
    "grammar_leak": ("fraction", "lower"),
    "grammar_valid": ("fraction", "higher"),
    "grammar_valid_diff": ("fraction", "higher"),
    "grammar_valid_own": ("fraction", "higher"),
}
_CALL = "call"


class CallNumbers(NamedTuple):
    """One model's numbers of each call, [calls] each: that no token leaks, and the log-probability."""

    valid: Floats
    log_p: Floats


def call_numbers(rows: TraceRows) -> CallNumbers:
    """Return a model's numbers of each call; one that is cut is valid with probability 0."""
    stays = np.asarray([np.prod(1 - leak) for leak in rows.of("leak_p", _CALL)], np.float64)
    return CallNumbers(np.where(rows.ended, stays, 0.0), rows.sums("log_p", _CALL))


def baseline_grammar(rows: TraceRows, seed: int) -> Metrics:
    """Return the baseline's leak and its probability of a valid call."""
    return _means({"grammar_leak": rows.values["leak_p"], "grammar_valid": call_numbers(rows).valid}, rows, seed)


def grammar_metrics(rows: TraceRows, baseline: TraceRows, seed: int) -> Metrics:
    """Return how a variant keeps to the grammar along the baseline's calls; nothing where numbers are not finite."""
    if bad := rows.non_finite("leak_p", "log_p"):
        return {name: Metric.broken(*kind, len(rows.items), bad) for name, kind in _KINDS.items()}
    own, base = call_numbers(rows), call_numbers(baseline)
    values = {
        "grammar_leak": rows.values["leak_p"],
        "grammar_valid": own.valid,
        "grammar_valid_diff": own.valid - base.valid,
        "grammar_valid_own": base.valid * np.exp(own.log_p - base.log_p),
    }
    return _means(values, rows, seed)


def _means(values: dict[str, Floats], rows: TraceRows, seed: int) -> Metrics:
    """Return the means of columns of rows or of calls, the prompts being clusters."""
    labels = {len(rows.ended): rows.items_of_traces, len(rows.items): rows.items}
    return as_metrics(
        {
            name: estimates.mean(
                column, Clusters.of(labels[len(column)]), unit=_KINDS[name][0], better=_KINDS[name][1], seed=seed
            )
            for name, column in values.items()
        }
    )
