"""How much each group of linears matters: KL from the baseline with that group alone quantized.

The work before a group's layer is shared: layers before it are replaced by what the baseline computed there, so a
group costs a forward pass of its own layer and those after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    layers = model.get_submodule(description.layers[0].rpartition(".")[0])
    outputs, final = _baseline(model, layers, ids)
    parameters = dict(model.named_parameters())
    kls = {}
    for group in description.groups:
        replaced = effective(group)
        if replaced:
            with _replaced(parameters, replaced), _recalled(layers, outputs, group.layer):
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
    return hidden[:, ::EVERY].reshape(-1, hidden.shape[-1])


class _Recalled(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: only attributes that the model reads of it
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)


@contextmanager
def _recalled(layers: nn.ModuleList, outputs: Sequence[Any], first: int) -> Iterator[None]:
    """The layers before `first` replaced by the output of the last of them."""
    originals = list(layers)[:first]
    try:
        for index in range(first):
            layers[index] = _Recalled(originals[index], outputs[first - 1])
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextmanager
def _replaced(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    saved = {name: parameters[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            parameters[name].copy_(value)
        yield
    finally:
        for name, value in saved.items():
            parameters[name].copy_(value)
