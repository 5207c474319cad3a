"""Patch a model for the length of a `with` block: known outputs in place of layers, other values of parameters."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from qeval.models.structure.graph import Description


def layers_of(model: Any, description: Description) -> nn.ModuleList:
    """Return the list of the model's decoder layers; the first one of a model that has several."""
    layers: nn.ModuleList = model.get_submodule(description.layers[0].rpartition(".")[0])
    return layers


class LayerOutput(NamedTuple):
    """The output of a decoder layer: its return value, and what later layers read elsewhere.

    `shared`: what the mappings among its keyword arguments hold after it, by the argument's name. Gemma 3n and Gemma 4
    put the keys and values into one that their later layers attend to.
    """

    returned: Any
    shared: Mapping[str, Mapping[Any, Any]]

    @classmethod
    def of(cls, keywords: Mapping[str, Any], returned: Any) -> "LayerOutput":
        """Return the output of a layer that was called with `keywords`."""
        mappings = {name: value for name, value in keywords.items() if isinstance(value, MutableMapping)}
        return cls(returned, {name: dict(value) for name, value in mappings.items()})


@contextmanager
def skip_layers(layers: nn.ModuleList, first: int, output: LayerOutput | None) -> Iterator[None]:
    """Replace the layers before `first` by the output of the last of them; None where `first` is 0."""
    originals = list(layers)[:first]
    try:
        for index, layer in enumerate(originals):
            assert output is not None
            layers[index] = _KnownOutput(layer, output)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextmanager
def replace_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Set other values of some parameters; the block gets the model's own, which are put back bit for bit."""
    saved = {name: parameters[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            parameters[name].copy_(value)
        yield saved
    finally:
        for name, value in saved.items():
            parameters[name].copy_(value)


class _KnownOutput(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, layer: nn.Module, output: LayerOutput) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: only attributes that the model reads of it
        self._output = output

    def forward(self, *_: Any, **keywords: Any) -> Any:
        for name, values in self._output.shared.items():
            keywords[name].update(values)
        return self._output.returned

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)
