"""Find the layer that hurts: KL with each group alone quantized, KL with all but it, and whether the first add up.

A table of single KLs misleads where they do not add up to the joint one; so both sides are measured. Either way the
work before a group's layer is shared: what the float model, or the wholly quantized one, computed there is reused.
Every figure has one value a sample, so that differences between figures are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qeval.metrics.tokens import mean_kl
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.head import Head
from qeval.progress import Advance
from qeval.quantize.patching import replace_values
from qeval.quantize.sensitivity import Effective, Passed, sample_tokens

KlBySample = tuple[float, ...]
"""Mean KL in nats of each sample."""
Quantized = Mapping[Group, Mapping[str, Tensor]]
"""Each group's quantized matrices as they act in the unfolded model, by name."""
OnFigure = Callable[[str, KlBySample], None]
"""Called with each figure and its name as soon as it is measured."""
JOINT = "all"
"""The name of the KL with every group quantized."""


@dataclass(frozen=True)
class Attribution:
    """The KL of all groups quantized; by a group's first name the KL of it alone, and that of all but it."""

    joint: KlBySample
    alone: Mapping[str, KlBySample]
    without: Mapping[str, KlBySample]


@torch.inference_mode()
def quantized_groups(description: Description, effective: Effective, advance: Advance) -> Quantized:
    """Quantize every group; all matrices are in memory together with the float ones.

    Args:
        description: The structure of the model.
        effective: Quantizes a group; groups that it returns nothing for are left out.
        advance: Called with 1 after each group.
    """
    quantized = {}
    for group in description.units:
        if values := effective(group):
            quantized[group] = values
        advance(1)
    return quantized


@torch.inference_mode()
def attribute(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    quantized: Quantized,
    known: Mapping[str, KlBySample],
    on_figure: OnFigure,
    advance: Advance,
) -> Attribution:
    """Measure every group alone, all groups together, and all but each.

    Args:
        model: The float model; it is left as it was.
        description: Its structure.
        head: Its output projection.
        samples: Token ids to measure on.
        quantized: Each group's quantized matrices.
        known: Figures that were measured before, by name: `all`, `alone GROUP` or `without GROUP`.
        on_figure: Called with each new figure.
        advance: Called with 1 after each figure, known ones included.
    """
    figures = dict(known)
    exact = Passed.of(model, description, sample_tokens(model, samples, len(samples)))

    def add(name: str, states: Callable[[], Tensor]) -> None:
        if name not in figures:
            figures[name] = _by_sample(head, exact, states())
            on_figure(name, figures[name])
        advance(1)

    for group, values in quantized.items():
        add(f"alone {group.names[0]}", lambda g=group, v=values: exact.states_with(g, v))  # type: ignore[misc]

    # with all groups quantized, each in turn gets its float weights back
    every = {name: value for values in quantized.values() for name, value in values.items()}
    with replace_values(exact.parameters, every) as floats:
        rounded = Passed.of(model, description, exact.ids)
        add(JOINT, lambda: rounded.final)
        for group, values in quantized.items():
            exact_values = {name: floats[name] for name in values}
            add(f"without {group.names[0]}", lambda g=group, v=exact_values: rounded.states_with(g, v))  # type: ignore[misc]
    return Attribution(figures[JOINT], _of_side("alone", quantized, figures), _of_side("without", quantized, figures))


def _by_sample(head: Head, exact: Passed, states: Tensor) -> KlBySample:
    """Return the mean KL of each sample, from the exact model's final states [positions, d_model] to others."""
    pairs = zip(exact.final.chunk(len(exact.ids)), states.chunk(len(exact.ids)), strict=True)
    return tuple(mean_kl(head.logits, base, head.logits, other) for base, other in pairs)


def _of_side(side: str, groups: Mapping[Group, object], figures: Mapping[str, KlBySample]) -> dict[str, KlBySample]:
    return {group.names[0]: figures[f"{side} {group.names[0]}"] for group in groups}
