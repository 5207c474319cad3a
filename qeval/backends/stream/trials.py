"""Quantized groups tried in a model that memory does not hold: all that is tried goes through the layers abreast.

The model is read once for all groups, or once forth and once back for the prediction: what the whole model's trials
compute group after group is computed layer after layer, by the same forward passes. So every group's hidden states are
kept, in the cache's folder where memory does not hold them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.backends.stream.backend import Streamed
from qeval.backends.stream.calibration import Live, Passes
from qeval.backends.stream.head import StreamedHead
from qeval.backends.stream.layer_output import States
from qeval.metrics.tokens import mean_kl
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.head import Head
from qeval.models.structure.weight_views import is_expert, one_by_one, watch_products
from qeval.progress import Advance, in_parts
from qeval.quantize import fisher, select_mix, sensitivity
from qeval.quantize.patching import replace_values
from qeval.quantize.sensitivity import Effective
from qeval.store.spill import Spill

_BASE = "base"


@dataclass(frozen=True, eq=False)
class StreamedTrials:
    """`calibrate.source.Trials` of a streamed model.

    `head` gives the model's head when it is needed, `logit_rows` the positions whose logits memory holds at a time, and
    `spill` a place for hidden states.
    """

    stream: Streamed
    description: Description
    samples: Sequence[Sequence[int]]
    passes: Passes
    head: Callable[[], Head | StreamedHead]
    logit_rows: int
    spill: Callable[[], Spill]

    @torch.inference_mode()
    def measure(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """Return the mean KL of every group quantized alone; `advance` is told the passes of each finished layer."""
        texts = [
            list(sample[: sensitivity.SENSITIVITY_LENGTH]) for sample in self.samples[: sensitivity.SENSITIVITY_SAMPLES]
        ]
        ids = torch.tensor(texts, device=self.stream.device)
        tried: list[str] = []
        with self._states() as states, self.passes.forward() as layers:
            for layer in layers:
                given = states.get_each(_BASE) if layer else None
                for name in tried:
                    states.put_each(name, self.stream.relay.run(layer, states.get_each(name), None, ids))
                tried += self._try_groups(layer, given, ids, effective, states)
                states.put_each(_BASE, self.stream.relay.run(layer, given, None, ids))
                advance(sum(unit.layer <= layer for unit in self.description.units))
            return self._kls(states, {name: [name] for name in tried}, [_BASE], sensitivity.measured_states)

    def _try_groups(
        self, layer: int, given: States | None, ids: Tensor, effective: Effective, states: Spill
    ) -> list[str]:
        """Quantize each group of a layer in turn and keep its states; the first names of those that are quantized."""
        tried = []
        parameters = Live(self.stream.model, self.description.head)
        for group in (group for group in self.description.units if group.layer == layer):
            replaced = effective(group)
            if replaced:
                with replace_values(parameters, replaced):
                    states.put_each(group.names[0], self.stream.relay.run(layer, given, None, ids))
                tried.append(group.names[0])
        return tried

    @torch.inference_mode()
    def measure_mixes(self, mixes: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """Return the mean KL of all groups quantized together, each way, over the last samples."""
        done = self._by_layers(advance)
        held_out = [list(sample[: select_mix.MIX_LENGTH]) for sample in self.samples[-select_mix.MIX_SAMPLES :]]
        ids = [torch.tensor([sample], device=self.stream.device) for sample in held_out]
        parameters = Live(self.stream.model, self.description.head)
        every: dict[str, Effective] = {_BASE: lambda group: {}, **mixes}
        with self._states() as states, self.passes.forward() as layers:
            for layer in layers:
                groups = [group for group in self.description.groups if group.layer == layer]
                for name, way in every.items():
                    with ExitStack() as quantized:
                        for group in groups:
                            quantized.enter_context(replace_values(parameters, way(group)))
                        self._pass_on(layer, name, ids, states)
                done()
            keys = {name: [(name, place) for place in range(len(ids))] for name in every}
            base = keys.pop(_BASE)
            return self._kls(states, keys, base, lambda hidden: hidden[0])

    def on_grid(self, name: str) -> "StreamedTrials":
        """Return itself: nothing is kept between trials."""
        return self

    def _pass_on(self, layer: int, name: str, ids: Sequence[Tensor], states: Spill) -> None:
        for place, tokens in enumerate(ids):
            given = states.get_each((name, place)) if layer else None
            states.put_each((name, place), self.stream.relay.run(layer, given, None, tokens))

    def _kls(
        self,
        states: Spill,
        keys: Mapping[str, Sequence[object]],
        base: Sequence[object],
        compared: Callable[[Tensor], Tensor],
    ) -> dict[str, float]:
        """Return the mean KL of final states kept under `keys` against those under `base`, by name."""
        logits = self.head().logits
        final = torch.cat([compared(states.get_each(key)[0]) for key in base])
        return {
            name: mean_kl(
                logits, final, logits, torch.cat([compared(states.get_each(key)[0]) for key in places]), self.logit_rows
            )
            for name, places in keys.items()
        }

    def predict(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """Return the predicted mean KL of every group quantized alone; `advance` is told on the way back."""
        done = self._by_layers(advance)
        texts = [list(sample[: fisher.FISHER_LENGTH]) for sample in self.samples[: fisher.FISHER_SAMPLES]]
        parameters, units = Live(self.stream.model, self.description.head), self.description.units
        watched = [fisher.Watched(parameters, group, effective) for group in units]
        with torch.inference_mode(False), self._states() as states, self._as_watched(units):
            ids = [torch.tensor([text], device=self.stream.device) for text in texts]
            with torch.no_grad():
                self._forth(ids, states)
                self._turn(ids, states)
            with torch.enable_grad(), self.passes.backward() as layers:
                for layer in layers:
                    sums = [product for product, g in zip(watched, units, strict=True) if g.layer == layer]
                    self._back(layer, ids, sums, states)
                    done()
        return {product.name: product.total / (2 * sum(map(len, texts))) for product in watched}

    def _by_layers(self, advance: Advance) -> Callable[[], None]:
        """Return what is called as each layer is done with, where all of them cost alike."""
        return in_parts(advance, sensitivity.trial_passes(self.description), len(self.description.layers))

    def _as_watched(self, units: Sequence[Group]) -> AbstractContextManager[None]:
        """Run experts on the way forth as they do when they are watched on the way back."""
        experts = any(is_expert(name) for group in units for name in group.names)
        return one_by_one(self.stream.model) if experts else nullcontext()

    def _forth(self, ids: Sequence[Tensor], states: Spill) -> None:
        """Keep every sample's states before each layer; after the last one they are the model's final states."""
        with self.passes.forward() as layers:
            for layer in layers:
                for place, tokens in enumerate(ids):
                    given = states.get_each((layer, place)) if layer else None
                    states.put_each((layer + 1, place), self.stream.relay.run(layer, given, None, tokens))

    def _turn(self, ids: Sequence[Tensor], states: Spill) -> None:
        """Compute the gradients at the final states."""
        generator, head = torch.Generator().manual_seed(0), self.head()
        positions = min(fisher.POSITIONS, self.logit_rows)
        for place in range(len(ids)):
            (final,) = states.get_each((len(self.stream.layers), place))
            gradient = fisher.label_gradient(head, final, generator, positions)
            states.put_each(("gradient", place), (gradient,))

    def _back(self, layer: int, ids: Sequence[Tensor], watched: Sequence[fisher.Watched], states: Spill) -> None:
        """Run one layer again for every sample, and take the gradients back through it."""
        with ExitStack() as hooks:
            after = {name: call for product in watched for name, call in product.listeners().items()}
            hooks.enter_context(watch_products(self.stream.model, after=after))
            embedding = self.stream.model.get_input_embeddings()
            hooks.callback(embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_()).remove)
            for place, tokens in enumerate(ids):
                given = tuple(map(_leaf, states.get_each((layer, place)))) if layer else None
                output = self.stream.relay.run(layer, given, None, tokens)
                _take_back(output, states.get_each(("gradient", place)))
                for product in watched:
                    product.end_pass()
                if given is not None:
                    states.put_each(("gradient", place), tuple(map(_gradient, given)))

    @contextmanager
    def _states(self) -> Iterator[Spill]:
        states = self.spill()
        try:
            yield states
        finally:
            states.close()


def _leaf(value: Tensor) -> Tensor:
    """Return a tensor that gradients end at; an indexer's choice takes none."""
    own = value.detach()
    return own.requires_grad_() if own.is_floating_point() else own


def _gradient(leaf: Tensor) -> Tensor:
    """Return a leaf's gradient; one without numbers where none reached it."""
    return leaf.new_empty(0) if leaf.grad is None else leaf.grad


def _take_back(output: States, gradients: States) -> None:
    """Take the gradients at what a layer handed on back through it."""
    pairs = [
        (tensor, gradient)
        for tensor, gradient in zip(output, gradients, strict=True)
        if tensor.requires_grad and gradient.numel()
    ]
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
