"""Lay a variant's parts beside it: the sum of the KLs of its parts alone over the KL of all together."""

from collections.abc import Mapping

import numpy as np

from qeval.report.model import Metric
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats
from qeval.store.run import VariantRecord

_ROUNDED = ("activations", "keys", "values")
"""The details of a variant's record that say what it rounds beside its weights, which are the parts' names too."""


def sum_over_joint(
    record: VariantRecord, kl: Mapping[str, Floats], windows: Clusters | None, seed: int
) -> Metric | None:
    """Return the sum of the parts' KLs over the variant's own, paired token by token.

    One says that the losses add up; below it, parts that are joined lose more than they do alone.

    Args:
        record: The variant's, which names its parts.
        kl: The KL of every scored position, by the variant's name; each [positions].
        windows: The clusters of these positions.
        seed: Of the bootstrap.

    Returns:
        None for a variant that was not split or not in all of its parts, or where nothing was lost.
    """
    names = (record.name, *record.parts.values())
    has_all = len(record.parts) > 1 and all(part in record.parts for part in _ROUNDED if part in record.details)
    if not has_all or windows is None or any(name not in kl for name in names):
        return None
    total = windows.sums(np.sum([kl[name] for name in record.parts.values()], axis=0))
    joint = windows.sums(kl[record.name])
    ratio = estimates.ratio(total, joint, n=kl[record.name].size, unit="ratio", better="neither", seed=seed)
    return None if ratio.value is None else Metric.of(ratio)
