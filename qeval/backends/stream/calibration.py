"""Calibrating a model that memory does not hold: the text's hidden states wait between layers, statistics by layer.

Every layer is run by the same code, on the same samples one at a time, as the whole model runs it, so statistics and
second moments are those of `calibrate.stream` and `calibrate.in_order`, bit for bit. What memory does not hold lies in
files without a name in the cache's folder.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any

from torch import Tensor

from qeval.backends.stream.backend import Streamed
from qeval.backends.stream.layer_output import States
from qeval.backends.stream.layer_runner import padded
from qeval.backends.stream.variant_reader import SavedVariant
from qeval.backends.stream.weights import layers_in_turn
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.weight_views import weight_of, weights_of
from qeval.progress import Advance
from qeval.quant.statistics import Accumulator, InputStatistics
from qeval.quantize.scaling import Search
from qeval.quantize.sequential import StopPass, Stream
from qeval.quantize.statistics import listening
from qeval.store.spill import Spill


class Live(Mapping[str, Tensor]):
    """A model's weights as they are now: those of the layer in memory, the others without numbers."""

    def __init__(self, model: Any, head: str) -> None:
        """`head`: the name of the head's matrix, which is listed also where it is tied."""
        self._model = model
        self._names = dict.fromkeys([*weights_of(model), head])

    def __getitem__(self, name: str) -> Tensor:
        """Return the weight of that name."""
        if name not in self._names:
            raise KeyError(name)
        return weight_of(self._model, name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in the model's order."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many weights there are."""
        return len(self._names)


class RelayedText(Stream):
    """The calibration text on its way through layers that are in memory one at a time."""

    def __init__(
        self,
        stream: Streamed,
        description: Description,
        samples: Sequence[Sequence[int]],
        states: Spill,
        *,
        all_experts: bool = False,
    ) -> None:
        """No layer is passed yet; `states` takes each sample's."""
        super().__init__(stream.model, description, samples, stream.device, all_experts=all_experts)
        self.parameters = Live(stream.model, description.head)
        self._relay, self._spill = stream.relay, states

    @property
    def passed(self) -> int:
        """The layers that the text has passed."""
        return self._next

    def pass_layer(self) -> None:
        """Take every sample's states through the next layer, whose weights are in memory."""
        for sample in range(len(self._ids)):
            self._spill.put_each(sample, self._through(sample))
        self._next += 1

    def _run(self, sample: int) -> None:
        with suppress(StopPass):
            self._through(sample)

    def _through(self, sample: int) -> States:
        given = self._spill.get_each(sample) if self._next else None
        return self._relay.run(self._next, given, None, self._ids[sample])


def run_streamed(
    stream: Streamed,
    variant: SavedVariant | None,
    samples: Sequence[Sequence[int]],
    states: Spill,
    advance: Advance,
    make_cache: Callable[[], Any],
) -> None:
    """Run calibration text through all layers, for whatever listens to them.

    Args:
        stream: The model.
        variant: Whose weights it has; None for its own.
        samples: Token ids, one sequence a forward pass.
        states: Takes each sample's between layers.
        advance: Called with the tokens of each pass through a layer.
        make_cache: Makes the cache of a pass, or None.
    """
    ids = [padded([sample], stream.device) for sample in samples]
    with closing(layers_in_turn(stream.weights(variant), range(len(stream.layers)))) as layers:
        for layer in layers:
            for sample, tokens in enumerate(ids):
                given = states.get_each(sample) if layer else None
                states.put_each(sample, stream.relay.run(layer, given, make_cache(), tokens))
                advance(tokens.shape[1])


class LayerStatistics(Mapping[str, InputStatistics]):
    """The statistics of one layer's inputs at a time; those of layers that the text has passed wait in a spill."""

    def __init__(self, text: RelayedText, stream: Streamed, groups: Sequence[Group], seed: int, sums: Spill) -> None:
        """Nothing is collected yet; as `calibrate.stream.collect`, `seed` and a group's place decide the sketch."""
        self._text, self._stream, self._seed, self._sums = text, stream, seed, sums
        self._places = dict(enumerate(groups))
        self._tokens: dict[str, int] = {}
        self._now: dict[str, InputStatistics] = {}

    def reach(self, layer: int) -> None:
        """Have the statistics of `layer`, whose weights are in memory; the first time layers are reached in order."""
        groups = {place: group for place, group in self._places.items() if group.layer == layer}
        self._now.clear()
        if layer == self._text.passed:
            self._collect(groups)
        reached = [group.names[0] for group in groups.values() if group.names[0] in self._tokens]
        self._now = {name: self._read(name) for name in reached}

    def _collect(self, groups: Mapping[int, Group]) -> None:
        device = self._stream.device
        sums = {g.names[0]: Accumulator(g.columns, self._seed + place, device) for place, g in groups.items()}
        members = list(groups.values())
        with listening(self._stream.model, members, sums, all_experts=self._text.all_experts):
            self._text.pass_layer()
        for name in list(sums):
            if not sums[name].tokens:  # an expert that none was routed to
                continue
            found = sums.pop(name).statistics()
            self._tokens[name] = found.tokens
            self._sums.put((name, "magnitude"), found.magnitude)
            self._sums.put((name, "sketch"), found.sketch)

    def _read(self, name: str) -> InputStatistics:
        magnitude, sketch = (self._sums.get((name, part)) for part in ("magnitude", "sketch"))
        return InputStatistics(self._tokens[name], magnitude, sketch)

    def __getitem__(self, name: str) -> InputStatistics:
        """Return the statistics of the group in the layer that was reached, by the name of its first linear."""
        return self._now[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the layer's groups."""
        return iter(self._now)

    def __len__(self) -> int:
        """Return how many groups the layer has."""
        return len(self._now)


class Passes:
    """Passes over the layers: each in memory in turn, its statistics at hand, and nothing kept of the layer before."""

    def __init__(self, stream: Streamed, search: Search, statistics: LayerStatistics | None) -> None:
        """`search` looks at the layer in memory."""
        self._stream, self._search, self._statistics = stream, search, statistics

    def forward(self) -> AbstractContextManager[Iterator[int]]:
        """Return the layers' indices, from the first on."""
        return self._turns(range(len(self._stream.layers)))

    def backward(self) -> AbstractContextManager[Iterator[int]]:
        """Return the layers' indices, from the last on."""
        return self._turns(range(len(self._stream.layers))[::-1])

    @contextmanager
    def _turns(self, order: Sequence[int]) -> Iterator[Iterator[int]]:
        with closing(layers_in_turn(self._stream.weights(), order)) as turns:
            yield self._reached(turns)

    def _reached(self, turns: Generator[int, None, None]) -> Iterator[int]:
        for layer in turns:
            self._search.forget()
            if self._statistics is not None:
                self._statistics.reach(layer)
            yield layer
        self._search.forget()
