"""The measured sensitivity of each group of linears: KL from the baseline with that group alone quantized.

The work before a group's layer is shared: layers before it are replaced by what the baseline computed there, so a
group costs a forward pass of its own layer and those after it; where layers don't run in turn, a whole one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qeval.errors import QevalError
from qeval.metrics.tokens import mean_kl
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.head import Head
from qeval.models.structure.weight_views import weights_of
from qeval.progress import Advance
from qeval.quantize.patching import LayerOutput, layers_of, replace_values, skip_layers

Effective = Callable[[Group], Mapping[str, Tensor]]
"""The group's quantized matrices as they act in the unfolded model, by name."""

SENSITIVITY_SAMPLES, SENSITIVITY_LENGTH, EVERY = 2, 256, 4
"""Calibration tokens that sensitivities are measured on; KL at every fourth position."""


def trial_passes(description: Description) -> int:
    """Return how many passes through a layer it takes to try every unit alone: its own layer, and those after it."""
    return sum(len(description.layers) - unit.layer for unit in description.units)


@torch.inference_mode()
def measure(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    effective: Effective,
    advance: Advance,
) -> dict[str, float]:
    """Measure the mean KL(baseline || one group quantized) in nats of every unit of groups, by its first name.

    Args:
        model: The float model; it is left as it was.
        description: Its structure.
        head: Its output projection.
        samples: Token ids of the calibration text, of which the first `SENSITIVITY_SAMPLES` are used.
        effective: Returns a group's quantized matrices as they act in the unfolded model, or none.
        advance: Called with the layers that each unit passes, `trial_passes` in all.
    """
    passed = Passed.of(model, description, sample_tokens(model, samples))
    kls = {}
    for group in description.units:
        if values := effective(group):
            kls[group.names[0]] = mean_kl(head.logits, passed.final, head.logits, passed.states_with(group, values))
        advance(len(description.layers) - group.layer)
    return kls


@dataclass(frozen=True, eq=False)
class Passed:
    """A model, the tokens that passed it, each layer's output, and the final states at every fourth position.

    Where layers don't run in turn, no output is kept.
    """

    model: Any
    layers: nn.ModuleList
    parameters: Mapping[str, Tensor]
    ids: Tensor
    outputs: list[LayerOutput]
    final: Tensor

    @classmethod
    def of(cls, model: Any, description: Description, ids: Tensor) -> "Passed":
        """Pass `ids` [samples, tokens] through the model as it is."""
        layers, weights = layers_of(model, description), weights_of(model)
        if not description.in_turn:
            return cls(model, layers, weights, ids, [], _states(model, ids))
        return cls(model, layers, weights, ids, *_through(model, layers, ids))

    def states_with(self, group: Group, values: Mapping[str, Tensor]) -> Tensor:
        """Return the final states with other values in one group; its layer and those after it are run."""
        skipped = group.layer if self.outputs else 0
        before = self.outputs[skipped - 1] if skipped else None
        with replace_values(self.parameters, values), skip_layers(self.layers, skipped, before):
            return _states(self.model, self.ids)


def sample_tokens(model: Any, samples: Sequence[Sequence[int]], count: int = SENSITIVITY_SAMPLES) -> Tensor:
    """Return the calibration tokens that sensitivities are measured on, [samples, length]."""
    return torch.tensor([list(sample[:SENSITIVITY_LENGTH]) for sample in samples[:count]], device=model.device)


def finite_kls(recipe: str, kls: Mapping[str, float]) -> dict[str, float]:
    """Return the KLs by name as they are; none may be undefined, or no choice could rest on them.

    Raises:
        QevalError: One is NaN or infinite; it is named.
    """
    broken = [name for name, kl in kls.items() if not math.isfinite(kl)]
    if broken:
        raise QevalError(
            f"'{recipe}': KL with {broken[0]} quantized is not finite on the calibration text (one of {len(broken)} "
            f"among {len(kls)}), so nothing can be chosen by it; compute in fp32 (--compute fp32), or mix "
            "two widths by --importance positional."
        )
    return dict(kls)


def _through(model: Any, layers: nn.ModuleList, ids: Tensor) -> tuple[list[LayerOutput], Tensor]:
    """Return each layer's output on `ids`, and the final states."""
    outputs: list[LayerOutput] = []

    def append(_: nn.Module, __: Any, keywords: Mapping[str, Any], returned: Any) -> None:
        outputs.append(LayerOutput.of(keywords, returned))

    handles = [layer.register_forward_hook(append, with_kwargs=True) for layer in layers]
    try:
        return outputs, _states(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def _states(model: Any, ids: Tensor) -> Tensor:
    return measured_states(FinalStates(model)(ids))


def measured_states(hidden: Tensor) -> Tensor:
    """Return the states that KL is measured at [positions, d_model], of all [samples, tokens, d_model]."""
    return hidden[:, ::EVERY].reshape(-1, hidden.shape[-1])
