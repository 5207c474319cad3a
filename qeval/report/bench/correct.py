"""Check that an engine's tokens are those of the model that it claims to run; the speed of others is withheld."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qeval.report.bench.rows import System
from qeval.report.model import Metric
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters
from qeval.store.timings import LEAST_EQUAL, Drift


@dataclass(frozen=True)
class Correctness:
    """One system's tokens against the reference's.

    `equal` is over all positions, its interval clustered by prompt; `first_divergence` the earliest of any prompt;
    `kl_nats` the mean over the prompts that diverge, at the token where they do; `margin_nats` the largest of these.
    """

    system: System
    prompts: int
    tokens: int
    equal: Metric
    diverged: int
    first_divergence: int | None
    kl_nats: Metric | None
    margin_nats: float | None
    rejoined: int
    rejoin_tokens: int

    @property
    def broken(self) -> bool:
        """Return whether so few tokens are the reference's that this can't be the same model."""
        return self.equal.value is None or self.equal.value < LEAST_EQUAL


def correctness(drifts: Sequence[Drift], seed: int) -> dict[System, Correctness]:
    """Return each checked system's record, by system."""
    by_system: dict[System, list[Drift]] = defaultdict(list)
    for drift in drifts:
        by_system[System(drift.engine, drift.variant)].append(drift)
    return {system: _summary(system, each, seed) for system, each in by_system.items()}


def _summary(system: System, drifts: Sequence[Drift], seed: int) -> Correctness:
    tokens = np.asarray([drift.tokens for drift in drifts], np.float64)
    equal = estimates.ratio(
        tokens * np.asarray([drift.equal_share for drift in drifts]),
        tokens,
        n=int(tokens.sum()),
        unit="fraction",
        better="higher",
        seed=seed,
    )
    apart = [drift for drift in drifts if drift.first_divergence is not None]
    return Correctness(
        system=system,
        prompts=len(drifts),
        tokens=int(tokens.sum()),
        equal=Metric.of(equal),
        diverged=len(apart),
        first_divergence=min((d.first_divergence for d in apart if d.first_divergence is not None), default=None),
        kl_nats=_mean([d.kl_nats for d in apart if d.kl_nats is not None], seed),
        margin_nats=max((d.margin_nats for d in apart if d.margin_nats is not None), default=None),
        rejoined=sum(bool(drift.rejoined) for drift in apart),
        rejoin_tokens=max((drift.rejoin_tokens for drift in apart), default=0),
    )


def _mean(values: Sequence[float], seed: int) -> Metric | None:
    if not values:
        return None
    rows = Clusters.single_rows(len(values))
    return Metric.of(estimates.mean(values, rows, unit="nats", better="lower", seed=seed))
