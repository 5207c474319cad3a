"""One perplexity from the rows by the run's convention, next to `ppl`, which is the mean over all scored tokens.

Each is a weighted mean of the windows' own mean NLLs, put through a monotonous function; so its interval is that of
the mean, resampled by windows. The figure's name is the convention's, so that none is laid beside another's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

from qeval.report.align import TokenRows
from qeval.report.model import Metric, Metrics
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats
from qeval.store.run import ProtocolRecord
from qeval.tasks.protocols import CONVENTIONS, DEFAULT_CONVENTION, Reduction
from qeval.types import Estimate

RATIO = f"Perplexity ratio ({DEFAULT_CONVENTION})"
"""Of the perplexity over all scored tokens to the baseline's, whatever else the run's convention makes of the rows."""

Change = Callable[[Floats], Floats]

_TITLES = {
    "ppl_hf_strided": "Perplexity (hf-strided)",
    "ppl_gptq_2048": "Perplexity (gptq-2048)",
    "ppl_llamacpp_512_half": "Perplexity (llamacpp-512-half)",
    "word_ppl": "Word perplexity (lm-eval-word)",
    "byte_ppl": "Byte perplexity (lm-eval-word)",
    "bits_per_byte": "Bits per byte (lm-eval-word)",
}


@dataclass(frozen=True)
class _Kind:
    """A figure: its unit, and what is done to the mean NLL a token."""

    unit: str
    change: Change


def convention_title(name: str) -> str:
    """Return a figure's name for readers; `ppl` is the default convention's."""
    return f"Perplexity ({DEFAULT_CONVENTION})" if name == "ppl" else _TITLES[name]


def convention_names(protocol: ProtocolRecord) -> list[str]:
    """Return the figures that the run's convention adds to `ppl`; none where it is the default's own."""
    return list(_kinds(protocol))


def convention_metrics(rows: TokenRows, protocol: ProtocolRecord, seed: int) -> Metrics:
    """Return the figures of the run's convention, from rows that are finite."""
    windows, nll = rows.by_window("nll"), rows.of("nll")
    weights = _weights(rows, windows, CONVENTIONS[protocol.convention].reduction)
    sums = windows.sums(nll) / windows.sizes() * weights

    # windows that overlap or repeat are drawn together
    clusters = _together(rows, windows)
    sums, weights = clusters.sums(sums), clusters.sums(weights)
    metrics = {}
    for name, kind in _kinds(protocol).items():
        metrics[name] = Metric.of(_estimate(sums, weights, nll.size, kind, seed))
    return metrics


def _together(rows: TokenRows, windows: Clusters) -> Clusters:
    """Return the cluster of each window that has an NLL."""
    labels = np.zeros(windows.count, np.int64)
    labels[windows.ids] = rows.clusters_of_rows[rows.scored["nll"]]
    return Clusters.of(labels)


def _estimate(sums: Floats, weights: Floats, n: int, kind: _Kind, seed: int) -> Estimate:
    return estimates.ratio(sums, weights, n=n, unit=kind.unit, better="lower", seed=seed, transform=kind.change)


def _kinds(protocol: ProtocolRecord) -> dict[str, _Kind]:
    if protocol.convention == DEFAULT_CONVENTION:
        return {}
    if CONVENTIONS[protocol.convention].reduction != "words":
        return {"ppl_" + protocol.convention.replace("-", "_"): _Kind("ppl", np.exp)}
    if not protocol.words or not protocol.bytes:
        return {}  # a part of the windows was drawn: their pages are not whole
    a_word, a_byte = protocol.nll_positions / protocol.words, protocol.nll_positions / protocol.bytes
    return {
        "word_ppl": _Kind("ppl", lambda mean: np.exp(mean * a_word)),
        "byte_ppl": _Kind("ppl", lambda mean: np.exp(mean * a_byte)),
        "bits_per_byte": _Kind("bits", lambda mean: mean * a_byte / log(2)),
    }


def _weights(rows: TokenRows, clusters: Clusters, reduction: Reduction) -> Floats:
    """Return the weight of each window's mean, [windows].

    The guide labels all tokens that are new in a window, the first of the text too, and counts one less in each.
    """
    if reduction == "windows":
        return np.ones(clusters.count)
    if reduction == "guide":
        return Clusters.of(rows.windows).sizes() - 1
    return clusters.sizes()
