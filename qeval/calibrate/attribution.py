"""Which layer hurts: KL with each group alone quantized, KL with all but it quantized, and whether the first add up.

A table of single KLs misleads where they do not add up to the joint one; so both sides are measured. Either way the
work before a group's layer is shared: what the float model, or the wholly quantized one, computed there is recalled.
Every figure is kept sample by sample, so that differences between figures are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qeval.calibrate.recall import replaced_by
from qeval.calibrate.sensitivity import Effective, Passed, tokens
from qeval.metrics.tokens import mean_kl
from qeval.models.graph import Description, Group
from qeval.models.head import Head
from qeval.progress import Advance

Figure = tuple[float, ...]
"""Mean KL in nats of each sample."""
Quantized = Mapping[Group, Mapping[str, Tensor]]
"""Each group's quantized matrices as they act in the unfolded model, by name."""
Tell = Callable[[str, Figure], None]
JOINT = "all"
"""The name of the KL with every group quantized."""


@dataclass(frozen=True)
class Attribution:
    """What all groups quantized cost; by a group's first name what it costs alone, and what all but it do."""

    joint: Figure
    alone: Mapping[str, Figure]
    without: Mapping[str, Figure]


@torch.inference_mode()
def quantized_groups(description: Description, effective: Effective, advance: Advance) -> Quantized:
    """Every group that has quantized matrices; all are held beside the float ones. `advance` is told 1 for each."""
    found = {}
    for group in description.units:
        if values := effective(group):
            found[group] = values
        advance(1)
    return found


@torch.inference_mode()
def attribute(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    quantized: Quantized,
    known: Mapping[str, Figure],
    tell: Tell,
    advance: Advance,
) -> Attribution:
    """Measure on every sample what `known` does not hold yet; each figure is told by name as soon as it is there.

    Names are `all`, `alone GROUP` and `without GROUP`. `advance` is told 1 for every figure.
    """
    found = dict(known)
    exact = Passed.of(model, description, tokens(model, samples, len(samples)))

    def keep(name: str, states: Callable[[], Tensor]) -> None:
        if name not in found:
            found[name] = _by_sample(head, exact, states())
            tell(name, found[name])
        advance(1)

    for group, values in quantized.items():
        keep(f"alone {group.names[0]}", lambda g=group, v=values: exact.states_with(g, v))  # type: ignore[misc]
    every = {name: value for values in quantized.values() for name, value in values.items()}
    with replaced_by(exact.parameters, every) as floats:
        rounded = Passed.of(model, description, exact.ids)
        keep(JOINT, lambda: rounded.final)
        for group, values in quantized.items():
            own = {name: floats[name] for name in values}
            keep(f"without {group.names[0]}", lambda g=group, o=own: rounded.states_with(g, o))  # type: ignore[misc]
    return Attribution(found[JOINT], _named("alone", quantized, found), _named("without", quantized, found))


def _by_sample(head: Head, exact: Passed, states: Tensor) -> Figure:
    """The mean KL of each sample, from the exact model's final states [positions, d_model] to others."""
    pairs = zip(exact.final.chunk(len(exact.ids)), states.chunk(len(exact.ids)), strict=True)
    return tuple(mean_kl(head.logits, base, head.logits, other) for base, other in pairs)


def _named(side: str, groups: Mapping[Group, object], found: Mapping[str, Figure]) -> dict[str, Figure]:
    return {group.names[0]: found[f"{side} {group.names[0]}"] for group in groups}
