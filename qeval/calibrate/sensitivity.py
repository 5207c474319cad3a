"""How much each group of linears matters: KL from the baseline with that group alone quantized.

The work before a group's layer is shared: layers before it are replaced by what the baseline computed there, so a
group costs a forward pass of its own layer and those after it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qeval.calibrate.recall import layers_of, recalled, replaced_by
from qeval.metrics.tokens import mean_kl
from qeval.models.graph import Description, Group
from qeval.models.head import Head
from qeval.progress import Advance

Effective = Callable[[Group], Mapping[str, Tensor]]
"""The group's quantized matrices as they act in the unfolded model, by name."""

SAMPLES, LENGTH, EVERY = 2, 256, 4
"""Calibration tokens that sensitivities are measured on; KL at every fourth position."""


@torch.inference_mode()
def measure(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    effective: Effective,
    advance: Advance,
) -> dict[str, float]:
    """Mean KL(baseline || one group quantized) in nats for every group, by the group's first name.

    `advance` is told 1 for every group.
    """
    ids = torch.tensor([list(sample[:LENGTH]) for sample in samples[:SAMPLES]], device=model.device)
    layers = layers_of(model, description)
    outputs, final = _baseline(model, layers, ids)
    parameters = dict(model.named_parameters())
    kls = {}
    for group in description.groups:
        replaced = effective(group)
        if replaced:
            with replaced_by(parameters, replaced), recalled(layers, group.layer, outputs[group.layer - 1]):
                states = _states(model, ids)
            kls[group.names[0]] = mean_kl(head.logits, final, head.logits, states)
        advance(1)
    return kls


def _baseline(model: Any, layers: nn.ModuleList, ids: Tensor) -> tuple[list[Any], Tensor]:
    """Each layer's output on `ids`, and the final states."""
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in layers]
    try:
        return outputs, _states(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def _states(model: Any, ids: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return compared(hidden)


def compared(hidden: Tensor) -> Tensor:
    """The states that KL is measured at [positions, d_model], of all [samples, tokens, d_model]."""
    return hidden[:, ::EVERY].reshape(-1, hidden.shape[-1])
