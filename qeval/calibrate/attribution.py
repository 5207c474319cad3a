"""Which layer hurts: KL with each group alone quantized, KL with all but it quantized, and whether the first add up.

A table of single KLs misleads where they do not add up to the joint one; so both sides are measured. Either way the
work before a group's layer is shared: what the float model, or the wholly quantized one, computed there is recalled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qeval.calibrate.recall import replaced_by
from qeval.calibrate.sensitivity import Effective, Passed, kl_with, tokens
from qeval.metrics.tokens import mean_kl
from qeval.models.graph import Description
from qeval.models.head import Head
from qeval.progress import Advance

Known = Mapping[str, float]
Tell = Callable[[str, float], None]
JOINT = "all"
"""The name of the KL with every group quantized."""


@dataclass(frozen=True)
class Attribution:
    """Mean KL in nats: all groups quantized; by a group's first name it alone, and all but it."""

    joint: float
    alone: Mapping[str, float]
    without: Mapping[str, float]


@torch.inference_mode()
def attribute(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    effective: Effective,
    known: Known,
    tell: Tell,
    advance: Advance,
) -> Attribution:
    """Measure what `known` does not hold yet; each figure is told under its name as soon as it is there.

    Names are `all`, `alone GROUP` and `without GROUP`. The quantized matrices are held beside the float ones meanwhile.
    `advance` is told 1 for every figure.
    """
    found = dict(known)

    def keep(name: str, kl: Callable[[], float | None]) -> None:
        if name not in found and (value := kl()) is not None:
            found[name] = value
            tell(name, value)
        advance(1)

    groups = description.units
    quantized = {group.names[0]: values for group in groups if (values := effective(group))}
    groups = tuple(group for group in groups if group.names[0] in quantized)
    ids = tokens(model, samples)
    exact = Passed.of(model, description, ids)
    for group in groups:
        keep(f"alone {group.names[0]}", lambda g=group: kl_with(exact, head, exact.final, g, quantized[g.names[0]]))  # type: ignore[misc]
    every = {name: value for values in quantized.values() for name, value in values.items()}
    with replaced_by(exact.parameters, every) as floats:
        rounded = Passed.of(model, description, ids)
        keep(JOINT, lambda: mean_kl(head.logits, exact.final, head.logits, rounded.final))
        for group in groups:
            own = {name: floats[name] for name in quantized[group.names[0]]}
            keep(f"without {group.names[0]}", lambda g=group, o=own: kl_with(rounded, head, exact.final, g, o))  # type: ignore[misc]
    names = list(quantized)
    return Attribution(found[JOINT], {n: found[f"alone {n}"] for n in names}, {n: found[f"without {n}"] for n in names})
