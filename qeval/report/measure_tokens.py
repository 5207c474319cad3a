"""From paired token rows to metrics. What is not finite is counted, and nothing of its kind is averaged."""

import numpy as np

from qeval.report.align import TokenRows
from qeval.report.conventions import convention_metrics
from qeval.report.model import Curve, Metric, Metrics
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats
from qeval.store.run import ProtocolRecord
from qeval.types import Better, Estimate

KL_LEVELS = {"kl_nats_p50": 0.5, "kl_nats_p90": 0.9, "kl_nats_p99": 0.99, "kl_nats_p99_9": 0.999}
_KL_MEANS: dict[str, tuple[str, Better]] = {
    "kl_nats": ("nats", "lower"),
    "reverse_kl_nats": ("nats", "lower"),
    "kl_abs_modelopt": ("nats", "lower"),
    "top1_agreement": ("fraction", "higher"),
    "overlap": ("fraction", "higher"),
    "top5_agreement": ("fraction", "higher"),
    "top10_agreement": ("fraction", "higher"),
    "sampling_kl_nats": ("nats", "lower"),
    "outside_nucleus": ("fraction", "lower"),
}
_LOWER_BOUND: dict[str, tuple[str, Better]] = {
    "kl_lower_bound_nats": ("nats", "lower"),
    "mass_outside": ("fraction", "neither"),
    "top1_agreement": ("fraction", "higher"),
}
_NLL_KINDS: dict[str, tuple[str, Better]] = {
    "ppl": ("ppl", "lower"),
    "ppl_ratio": ("ratio", "lower"),
    "nll_diff_nats": ("nats", "lower"),
}
DELTA_LEVELS = {"delta_p_p01": 0.01, "delta_p_p05": 0.05, "delta_p_p50": 0.5, "delta_p_p95": 0.95, "delta_p_p99": 0.99}
_DELTA_KINDS: dict[str, tuple[str, Better]] = {
    "delta_p": ("probability", "higher"),
    "delta_p_rms": ("probability", "lower"),
    **dict.fromkeys(DELTA_LEVELS, ("probability", "higher")),
}
_CURVE_POINTS = 160
_LARGEST_EXPONENT = 700.0  # exp of more than 709 is infinite in float64


def kl_metrics(rows: TokenRows, seed: int) -> Metrics:
    """Return how far the variant's distributions lie from the baseline's; `top1_agreement` with them.

    Of a model behind an endpoint it is a lower bound, under a name of its own.
    """
    if rows.is_bounded:
        return _lower_bound_metrics(rows, seed)
    bad = _count_bad(rows, ("kl_nats", "reverse_kl_nats", "kl_abs_modelopt"))
    if bad:
        tails: dict[str, tuple[str, Better]] = dict.fromkeys((*KL_LEVELS, "kl_nats_max"), ("nats", "lower"))
        tails |= {"kl_nats_p99_over_mean": ("ratio", "neither")}
        means = {name: kind for name, kind in _KL_MEANS.items() if rows.scored[name].any()}
        return _broken(means | tails, int(rows.scored["kl_nats"].sum()), bad)

    clusters, kl = rows.clusters("kl_nats"), rows.of("kl_nats")
    metrics = {
        name: estimates.mean(rows.of(name), clusters, unit=unit, better=better, seed=seed)
        for name, (unit, better) in _KL_MEANS.items()
        if rows.scored[name].any()  # runs from before a column was kept have none of it
    }

    # the tail
    levels = list(KL_LEVELS.values())
    quantiles = estimates.quantiles(kl, levels, clusters, unit="nats", better="lower", seed=seed)
    metrics |= dict(zip(KL_LEVELS, quantiles, strict=True))
    if kl.size and kl.sum() > 0:
        metrics["kl_nats_p99_over_mean"] = estimates.quantile_over_mean(kl, 0.99, clusters, better="neither", seed=seed)
    metrics["kl_nats_max"] = estimates.maximum(kl, clusters, unit="nats", better="lower")
    return as_metrics(metrics)


def _lower_bound_metrics(rows: TokenRows, seed: int) -> Metrics:
    if bad := _count_bad(rows, tuple(_LOWER_BOUND)):
        return _broken(_LOWER_BOUND, int(rows.scored["kl_lower_bound_nats"].sum()), bad)
    return as_metrics(
        {
            name: estimates.mean(rows.of(name), rows.clusters(name), unit=unit, better=better, seed=seed)
            for name, (unit, better) in _LOWER_BOUND.items()
        }
    )


def kernel_metrics(rows: TokenRows, seed: int) -> Metrics:
    """Return how far the model lies from the same weights in torch; none where it was not compared with them."""
    total = int(rows.scored["kernel_kl_nats"].sum())
    if not total:
        return {}
    kind: tuple[str, Better] = ("nats", "lower")
    if bad := _count_bad(rows, ("kernel_kl_nats",)):
        return _broken({"kernel_kl_nats": kind}, total, bad)
    kl, clusters = rows.of("kernel_kl_nats"), rows.clusters("kernel_kl_nats")
    return as_metrics({"kernel_kl_nats": estimates.mean(kl, clusters, unit="nats", better="lower", seed=seed)})


def kl_curve(rows: TokenRows) -> Curve | None:
    """Return which share of positions has at least which KL, down to the single worst one; None where not finite."""
    kl = np.sort(rows.of("kl_nats"))
    if not kl.size or not np.isfinite(kl).all():
        return None
    worst = np.unique(np.geomspace(1, kl.size, _CURVE_POINTS).round().astype(int))
    return Curve(share=(worst / kl.size).tolist(), kl_nats=kl[kl.size - worst].tolist())


def baseline_perplexity(rows: TokenRows, protocol: ProtocolRecord, seed: int) -> Metrics:
    """Return the baseline's own perplexity, over all scored tokens and by the run's convention."""
    bad = _count_bad_nll(rows)
    if bad:
        return _broken({"ppl": _NLL_KINDS["ppl"]}, int(rows.scored["nll"].sum()), bad)
    metrics = as_metrics({"ppl": estimates.perplexity(rows.of("nll"), rows.clusters("nll"), seed=seed)})
    return metrics | convention_metrics(rows, protocol, seed)


def nll_metrics(rows: TokenRows, baseline: TokenRows, protocol: ProtocolRecord, seed: int) -> Metrics:
    """Return perplexity (also by the run's convention), its ratio to the baseline's, and the difference of NLL."""
    bad = _count_bad_nll(rows)
    if bad:
        return _broken(_NLL_KINDS, int(rows.scored["nll"].sum()), bad)
    nll, base, clusters = rows.of("nll"), baseline.of("nll"), rows.clusters("nll")
    metrics = as_metrics(
        {
            "ppl": estimates.perplexity(nll, clusters, seed=seed),
            "ppl_ratio": estimates.perplexity_ratio(nll, base, clusters, seed=seed),
            "nll_diff_nats": estimates.difference(nll, base, clusters, unit="nats", better="lower", seed=seed),
        }
    )
    return metrics | convention_metrics(rows, protocol, seed)


def delta_metrics(rows: TokenRows, seed: int) -> Metrics:
    """Return the change of the true token's probability: mean, root mean square, quantiles; none where not scored."""
    total = int(rows.scored["delta_p"].sum())
    if not total:
        return {}
    bad = _count_bad(rows, ("delta_p",))
    if bad:
        return _broken(_DELTA_KINDS, total, bad)
    delta, clusters = rows.of("delta_p"), rows.clusters("delta_p")
    levels = list(DELTA_LEVELS.values())
    quantiles = estimates.quantiles(delta, levels, clusters, unit="probability", better="higher", seed=seed)
    return as_metrics(
        dict(zip(DELTA_LEVELS, quantiles, strict=True))
        | {
            "delta_p": estimates.mean(delta, clusters, unit="probability", better="higher", seed=seed),
            "delta_p_rms": estimates.root_mean_square(delta, clusters, unit="probability", better="lower", seed=seed),
        }
    )


def kl_difference(kl: Floats, other: Floats, windows: Clusters, seed: int) -> Metric:
    """Return the mean of two variants' paired differences in KL, from their rows [rows]."""
    return Metric.of(estimates.difference(kl, other, windows, unit="nats", better="lower", seed=seed))


def as_metrics(named: dict[str, Estimate]) -> Metrics:
    """Return estimates in the file's form."""
    return {name: Metric.of(estimate) for name, estimate in named.items()}


def _broken(kinds: dict[str, tuple[str, Better]], total: int, bad: int) -> Metrics:
    return {name: Metric.broken(unit, better, total, bad) for name, (unit, better) in kinds.items()}


def _count_bad_nll(rows: TokenRows) -> int:
    """Count as `_count_bad`; all rows, where they are finite but a window's perplexity is no float64 any more."""
    bad = _count_bad(rows, ("nll",))
    if bad or not rows.scored["nll"].any():
        return bad
    clusters, nll = rows.by_window("nll"), rows.of("nll")
    return nll.size if (clusters.sums(nll) / clusters.sizes()).max() > _LARGEST_EXPONENT else 0


def _count_bad(rows: TokenRows, columns: tuple[str, ...]) -> int:
    """Return in how many rows any of the columns is scored and not finite."""
    bad = np.zeros(len(rows.windows), np.bool_)
    for column in columns:
        bad |= rows.scored[column] & ~np.isfinite(rows.values[column])
    return int(bad.sum())
