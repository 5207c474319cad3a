"""The parameters of one decoder layer at a time, in memory that every layer uses again."""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qeval.models.checkpoint.meta_model import names_of_parameters, set_parameter
from qeval.models.checkpoint.safetensors_rows import Plain, Raw, StoredTensor, gather_rows
from qeval.models.structure.precision import outside_autocast
from qeval.models.structure.weight_views import names_of_weights, weight_of
from qeval.quantize.rotation_plan import WeightStep, take_steps, takes_rows_alone

Raws = dict[str, Raw]
TensorCheck = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The location of each weight of a model: a variant's folder first, then the checkpoint."""

    checkpoint: Mapping[str, StoredTensor]
    variant: Mapping[str, StoredTensor]

    def __getitem__(self, name: str) -> StoredTensor:
        """Return the tensor of a weight's name."""
        return self.variant.get(name) or self.checkpoint[name]


@dataclass(frozen=True, eq=False)
class TurnedTensor:
    """A tensor that takes steps of a rotation when it is decoded: whole, unless each of its rows takes them alone."""

    stored: StoredTensor
    steps: Sequence[WeightStep]

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.stored.shape

    @property
    def raw_bytes(self) -> int:
        """As stored."""
        return self.stored.raw_bytes

    def fetch(self, start: int, stop: int) -> Raw:
        """As stored."""
        return self.stored.fetch(start, stop)

    def decode(self, raw: Raw, out: Tensor) -> None:
        """Write the turned values of fetched rows."""
        assert len(out) == self.shape[0] or takes_rows_alone(self.steps)
        self.stored.decode(raw, out)
        out.copy_(outside_autocast(take_steps)(out, self.steps))


class LayerWeights:
    """Puts a layer's parameters into a weightless model and takes them out again; the next layer is read ahead."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[str],
        tensors: Tensors,
        device: torch.device,
        change: TensorCheck | None = None,
    ) -> None:
        """`layers` are the names of the model's decoder layers, in order; `change` may change in place what is read."""
        self._change = change
        self._model, self._tensors, self.device = model, tensors, device
        every, weights = dict(model.named_parameters(remove_duplicate=False)), names_of_weights(model)
        self._prefixes = tuple(f"{layer}." for layer in layers)
        self._parameters = [tuple(name for name in every if name.startswith(prefix)) for prefix in self._prefixes]
        self._weights = [
            {name: stored for name, stored in weights.items() if name.startswith(prefix)} for prefix in self._prefixes
        ]
        """The weights of each layer, and the names that they are stored by: a block that layers share has one."""
        self._empty = {name: every[name] for names in self._parameters for name in names}
        self._used: dict[str, nn.Parameter] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[Raws]] | None = None

    @property
    def count(self) -> int:
        """The number of layers."""
        return len(self._parameters)

    @property
    def largest_bytes(self) -> int:
        """The most that one layer takes: its parameters as they are computed with, and the next one's as read."""
        places: dict[str, int] = {}
        for prefix, names in zip(self._prefixes, self._parameters, strict=True):
            for name in names:
                place, empty = name.removeprefix(prefix), self._empty[name]
                places[place] = max(places.get(place, 0), empty.numel() * empty.element_size())
        raw = (sum(self._tensors[name].raw_bytes for name in names.values()) for names in self._weights)
        return sum(places.values()) + max(raw, default=0)

    def install(self, index: int, ahead: int | None, check: TensorCheck | None = None) -> None:
        """Install the parameters of layer `index`; then start to read layer `ahead`. `check` sees each parameter."""
        raws = self._take(index)
        for name in self._parameters[index]:
            set_parameter(self._model, name, self._memory(index, name))
        for name, stored in self._weights[index].items():
            weight = weight_of(self._model, name).detach()
            self._tensors[stored].decode(raws.pop(name), weight)
            if self._change:
                self._change(stored, weight)
            if check:
                check(stored, weight)
        if ahead is not None:
            self._ahead = (ahead, self._reader.submit(self._fetch, ahead))

    def remove(self, index: int) -> None:
        """Layer `index` is weightless again."""
        for name in self._parameters[index]:
            set_parameter(self._model, name, self._empty[name])

    def release(self) -> None:
        """Let go of the memory that layers used; what was read ahead is dropped."""
        if self._ahead is not None:
            self._ahead[1].cancel() or self._ahead[1].result()
        self._ahead = None
        self._used.clear()

    def close(self) -> None:
        """Release, and end the thread."""
        self.release()
        self._reader.shutdown()

    def _take(self, index: int) -> Raws:
        if self._ahead is not None and self._ahead[0] == index:
            raws = self._ahead[1].result()
            self._ahead = None
            return raws
        self.release()
        return self._fetch(index)

    def _fetch(self, index: int) -> Raws:
        found = {}
        for name, stored_name in self._weights[index].items():
            stored = self._tensors[stored_name]
            found[name] = stored.fetch(0, stored.shape[0] if stored.shape else 1)
        return found

    def _memory(self, index: int, name: str) -> nn.Parameter:
        """Memory of a parameter's shape and type: the same place's in the layer before, where that fits."""
        place, empty = name.removeprefix(self._prefixes[index]), self._empty[name]
        used = self._used.get(place)
        if used is None or used.shape != empty.shape or used.dtype != empty.dtype:
            self._used.pop(place, None)
            value = torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
            used = self._used[place] = nn.Parameter(value, requires_grad=False)
        return used


def layers_in_turn(weights: LayerWeights, order: Sequence[int]) -> Generator[int, None, None]:
    """Yield each layer of `order` while its weights are in the model and the next one's are read; close `weights`."""
    try:
        for index, ahead in zip(order, [*order[1:], None], strict=True):
            weights.install(index, ahead)
            try:
                yield index
            finally:
                weights.remove(index)
    finally:
        weights.close()


def hollow(parameter: Tensor, device: torch.device) -> nn.Parameter:
    """Return a parameter of the same shape and type on a device, of zeros that take no memory.

    It stands for the embedding, whose rows are looked up: models move ids to its device (Llama 4), or look at its row
    of padding (Gemma 4).
    """
    zero = torch.zeros((), dtype=parameter.dtype, device=device)
    return nn.Parameter(zero.expand(parameter.shape), requires_grad=False)


class LookedUp:
    """An embedding that reads the rows of the tokens it is asked for; the module's own forward does the rest."""

    def __init__(self, module: nn.Module, stored: Plain, steps: Sequence[WeightStep] = ()) -> None:
        """`module` is a weightless `nn.Embedding` or a subclass of it; `steps` are what its rows go through."""
        self._module, self._stored, self._steps = module, stored, steps
        self._empty = module._parameters["weight"]
        assert self._empty is not None
        self._dtype = self._empty.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the embeddings of `ids`, in the shape and type of the module's own."""
        rows, places = torch.unique(ids, return_inverse=True)
        table = outside_autocast(gather_rows)(self._stored.entry, rows.tolist()).to(
            device=ids.device, dtype=self._dtype
        )
        if self._steps:
            table = outside_autocast(take_steps)(table, self._steps)
        self._module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
        try:
            found: Tensor = type(self._module).forward(self._module, places)
        finally:
            self._module._parameters["weight"] = self._empty
        return found


def load_whole(model: Any, names: Sequence[str], tensors: Tensors, device: torch.device, check: TensorCheck) -> int:
    """Load some parameters for good; returns their bytes."""
    parameters, every = dict(model.named_parameters()), names_of_parameters(model)
    for name in names:
        value = _whole(tensors[name], parameters[name], device)
        check(name, value)
        parameter = nn.Parameter(value, requires_grad=False)
        for place in every[name]:
            set_parameter(model, place, parameter)
    return sum(prod(parameters[name].shape) * parameters[name].element_size() for name in names)


def load_buffer(model: Any, name: str, stored: StoredTensor, device: torch.device) -> int:
    """Load a buffer for good, such as the biases that balance a layer's experts; returns its bytes."""
    holder, _, leaf = name.rpartition(".")
    module, empty = model.get_submodule(holder), model.get_buffer(name)
    module._buffers[leaf] = value = _whole(stored, empty, device)
    return value.nbytes


def _whole(stored: StoredTensor, empty: Tensor, device: torch.device) -> Tensor:
    value = torch.empty(empty.shape, dtype=empty.dtype, device=device)
    stored.decode(stored.fetch(0, stored.shape[0] if stored.shape else 1), value)
    return value
