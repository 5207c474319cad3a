"""A model with something put in its place for a while: known outputs for layers, other values for parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qeval.models.graph import Description


def layers_of(model: Any, description: Description) -> nn.ModuleList:
    """The list of the model's decoder layers."""
    layers: nn.ModuleList = model.get_submodule(description.layers[0].rpartition(".")[0])
    return layers


@contextmanager
def recalled(layers: nn.ModuleList, first: int, output: Any) -> Iterator[None]:
    """The layers before `first` replaced by `output`, which the last of them gave (unused where first is 0)."""
    originals = list(layers)[:first]
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Recalled(layer, output)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextmanager
def replaced_by(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The model with other values of some parameters; its own are given to the block, and put back bit for bit."""
    saved = {name: parameters[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            parameters[name].copy_(value)
        yield saved
    finally:
        for name, value in saved.items():
            parameters[name].copy_(value)


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
