"""From the rows along the baseline's chains of thought to metrics; every interval resamples questions.

Along a chain a model's hazard h[t] is the probability that it stops at token t: the mass of the tokens that end
thinking or the turn. Sampled, it would go on to token t with S[t] = product of (1 - h) before t: the survival function
of a discrete time (J. P. Klein and M. L. Moeschberger, Survival Analysis, 2003, section 2.4). The sum of S over the
chain is its mean length, restricted to the chain's.
"""

from typing import NamedTuple

import numpy as np

from qeval.report.measure_tokens import as_metrics
from qeval.report.model import Metric, Metrics
from qeval.report.trace_rows import TraceRows
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats
from qeval.types import Better, Estimate

_KINDS: dict[str, tuple[str, Better]] = {
    "reasoning_kl_nats": ("nats", "lower"),
    "reasoning_answer_nll": ("nats", "lower"),
    "reasoning_answer_nll_diff": ("nats", "lower"),
    "reasoning_acc": ("fraction", "higher"),
    "reasoning_acc_diff": ("fraction", "higher"),
    "reasoning_flips": ("fraction", "lower"),
    "reasoning_length_ratio": ("ratio", "neither"),
    "reasoning_unfinished": ("fraction", "neither"),
    "reasoning_unfinished_diff": ("fraction", "neither"),
    "reasoning_doubt": ("fraction", "neither"),
    "reasoning_doubt_ratio": ("ratio", "neither"),
}
_CHAIN, _ANSWER, _AFTER = "chain", "answer", "after"


class ReasoningItems(NamedTuple):
    """One model's numbers of each question, [questions] each; `kl` and `doubt` are sums over the chain."""

    kl: Floats
    tokens: Floats
    answer_nll: Floats
    is_right: Floats
    length: Floats
    unfinished: Floats
    doubt: Floats


def reasoning_items(rows: TraceRows) -> ReasoningItems:
    """Return a model's numbers of each question; an answer is right where every token is the likeliest, and it ends."""
    survival = [np.cumprod(1 - hazard) for hazard in rows.of("stop_p", _CHAIN)]
    behind = np.isin(rows.pieces, (_ANSWER, _AFTER))
    wrong = np.bincount(rows.traces[behind], weights=~rows.matches[behind], minlength=len(rows.ended))
    return ReasoningItems(
        kl=rows.sums("kl_nats", _CHAIN),
        tokens=np.asarray([len(values) for values in rows.of("kl_nats", _CHAIN)], np.float64),
        answer_nll=-rows.sums("log_p", _ANSWER),
        is_right=np.asarray(wrong == 0, np.float64),
        # the first token comes in any case, each later one where none before it ended the chain
        length=np.asarray([1 + each[:-1].sum() if len(each) else 0.0 for each in survival], np.float64),
        unfinished=np.asarray([each[-1] if len(each) else 1.0 for each in survival], np.float64),
        doubt=rows.sums("doubt_p", _CHAIN),
    )


def baseline_reasoning(rows: TraceRows, seed: int) -> Metrics:
    """Return the baseline's own metrics."""
    return as_metrics(_own(reasoning_items(rows), rows, seed))


def reasoning_metrics(rows: TraceRows, baseline: TraceRows, seed: int) -> Metrics:
    """Return how a variant goes along the baseline's chains; nothing where its numbers are not finite."""
    if bad := non_finite_reasoning(rows):
        return {name: Metric.broken(*kind, len(rows.items), bad) for name, kind in _KINDS.items()}
    own, base = reasoning_items(rows), reasoning_items(baseline)
    questions = Clusters.single_rows(len(own.kl))

    def mean(name: str, values: Floats, clusters: Clusters = questions) -> Estimate:
        unit, better = _KINDS[name]
        return estimates.mean(values, clusters, unit=unit, better=better, seed=seed)

    def ratio(name: str, above: Floats, below: Floats, count: int) -> Estimate:
        unit, better = _KINDS[name]
        return estimates.ratio(above, below, n=count, unit=unit, better=better, seed=seed)

    chain = rows.pieces == _CHAIN
    tokens, ended = int(own.tokens.sum()), rows.ended
    found = {
        "reasoning_kl_nats": mean("reasoning_kl_nats", rows.values["kl_nats"][chain], Clusters.of(rows.items[chain])),
        "reasoning_answer_nll_diff": mean("reasoning_answer_nll_diff", own.answer_nll - base.answer_nll),
        "reasoning_acc_diff": mean("reasoning_acc_diff", own.is_right - base.is_right),
        "reasoning_flips": mean("reasoning_flips", np.abs(own.is_right - base.is_right)),
        "reasoning_length_ratio": ratio("reasoning_length_ratio", own.length, base.length, tokens),
        **_own(own, rows, seed),
    }
    if ended.any():
        later = (own.unfinished - base.unfinished)[ended]
        found["reasoning_unfinished_diff"] = mean(
            "reasoning_unfinished_diff", later, Clusters.single_rows(int(ended.sum()))
        )
    if np.isfinite(own.doubt).all():
        found["reasoning_doubt_ratio"] = ratio("reasoning_doubt_ratio", own.doubt, base.doubt, tokens)
    return as_metrics({name: found[name] for name in _KINDS if name in found})


def non_finite_reasoning(rows: TraceRows) -> int:
    """Return how many of a variant's rows have a distance or a probability that is not finite."""
    forced = rows.pieces != _AFTER
    bad = ~np.isfinite(rows.values["kl_nats"]) | ~np.isfinite(rows.values["stop_p"])
    return int(np.count_nonzero(bad | (forced & ~np.isfinite(rows.values["log_p"]))))


def _own(items: ReasoningItems, rows: TraceRows, seed: int) -> dict[str, Estimate]:
    """Return what a model's rows say without the other's."""
    questions, ended = Clusters.single_rows(len(items.kl)), rows.ended
    means = {"reasoning_answer_nll": items.answer_nll, "reasoning_acc": items.is_right}
    found = {
        name: estimates.mean(values, questions, unit=_KINDS[name][0], better=_KINDS[name][1], seed=seed)
        for name, values in means.items()
    }
    if ended.any():
        found["reasoning_unfinished"] = estimates.mean(
            items.unfinished[ended],
            Clusters.single_rows(int(ended.sum())),
            unit="fraction",
            better="neither",
            seed=seed,
        )
    if np.isfinite(items.doubt).all():
        found["reasoning_doubt"] = estimates.ratio(
            items.doubt, items.tokens, n=int(items.tokens.sum()), unit="fraction", better="neither", seed=seed
        )
    return found
