"""Opens a weightless model as sessions: the baseline's, or a saved variant's, read from its packed form."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qeval.backends.base import Saved, Target
from qeval.backends.install import scaled_input
from qeval.backends.memory import batch_tokens, rounding_bytes, token_activations
from qeval.backends.schemes import kv_changes, rounded_inputs
from qeval.backends.sharing import Sharing
from qeval.backends.stream.budget import Budget
from qeval.backends.stream.head import StreamedHead, head_of_parts
from qeval.backends.stream.layer_output import States
from qeval.backends.stream.layer_runner import Relay
from qeval.backends.stream.proof import proven
from qeval.backends.stream.session import LOGIT_ARRAYS, StreamSession
from qeval.backends.stream.variant_reader import SavedVariant, saved_variant
from qeval.backends.stream.weights import (
    LayerWeights,
    LookedUp,
    Tensors,
    TurnedTensor,
    hollow,
    layers_in_turn,
    load_buffer,
    load_whole,
)
from qeval.errors import QevalError, UsageError
from qeval.models.checkpoint.fit import saved_buffers
from qeval.models.checkpoint.meta_model import names_of_parameters, set_parameter
from qeval.models.checkpoint.safetensors_rows import Plain, StoredTensor
from qeval.models.checkpoint.weight_map import map_weights
from qeval.models.checkpoint.weights import TensorEntry
from qeval.models.load import check_finite
from qeval.models.structure.graph import Description, Probe, describe_model
from qeval.models.structure.head import Head, head_of
from qeval.models.structure.kv_cache import HeadShape, check_cache
from qeval.models.structure.trace import decoder_layers, probe_tokens
from qeval.models.structure.weight_views import modules_of
from qeval.progress import Progress
from qeval.quant.scheme import Scheme
from qeval.quantize.rotating import turn_input

_STATE_BYTES = 4
_PROBE_ROWS = 256
"""Rows of the head that it is checked with."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """A weightless model that can run: what lies outside its decoder layers is in memory, the layers are not."""

    model: Any
    relay: Relay
    layers: tuple[str, ...]
    checkpoint: Mapping[str, StoredTensor]
    embedding_name: str
    head_name: str
    device: torch.device
    resident: int
    """Bytes of the parameters outside the layers."""
    change: Callable[[str, Tensor], None] | None = None
    """What changes each weight of a layer, by name, in place, when it is read."""

    def weights(self, variant: SavedVariant | None = None) -> LayerWeights:
        """Return the decoder layers' weights, a variant's in place of the model's own."""
        tensors = Tensors(self.checkpoint, variant.tensors if variant else {})
        return LayerWeights(self.model, self.layers, tensors, self.device, self.change)

    def outside_of(self, variant: SavedVariant) -> AbstractContextManager[None]:
        """Put what a variant changes outside the layers in the model's place for a while, as `outside_with`."""
        return self.outside_with({name: variant.tensors[name] for name in variant.manifest.floats})

    @contextmanager
    def outside_with(self, tensors: Mapping[str, StoredTensor]) -> Iterator[None]:
        """Put those tensors that lie outside the layers (embeddings, the final norm) in the model's place for a while.

        The head's matrix is not among them: a session reads that by itself.
        """
        inside = tuple(f"{layer}." for layer in self.layers)
        names = [name for name in tensors if not name.startswith(inside)]
        embedding, parameters = self.model.get_input_embeddings(), dict(self.model.named_parameters())
        others = [name for name in names if name not in (self.embedding_name, self.head_name)]
        own = {name: parameters[name] for name in others if name in parameters}  # a tied head's own name is none
        places = names_of_parameters(self.model)
        own_lookup, table = embedding.forward, tensors.get(self.embedding_name)
        steps = table.steps if isinstance(table, TurnedTensor) else ()
        table = table.stored if isinstance(table, TurnedTensor) else table
        try:
            if isinstance(table, Plain):
                embedding.forward = LookedUp(embedding, table, steps)
            load_whole(self.model, list(own), Tensors(self.checkpoint, tensors), self.device, _accept)
            yield
        finally:
            embedding.forward = own_lookup
            for name, parameter in own.items():
                for place in places[name]:
                    set_parameter(self.model, place, parameter)


def streamed(model: Any, entries: list[TensorEntry], device: torch.device, compute: str) -> Streamed:
    """Make a weightless model run: its embedding looks rows up in the file, the few weights outside layers are loaded.

    Raises:
        UsageError: its decoder is no plain list of layers, the checkpoint is not its own, or a weight is not finite.
    """
    layers = decoder_layers(model)
    if len({name.rpartition(".")[0] for name in layers}) > 1:
        raise UsageError(
            f"{type(model).__name__} has several stacks of layers that read each other's states, so they can't be read "
            "one at a time; leave --stream out."
        )
    inside = tuple(f"{name}." for name in layers)
    checkpoint = map_weights(model, entries, str(entries[0].path.parent)).stored
    names = {id(module): module_name for module_name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding_name = f"{names[id(embedding)]}.weight"
    head_name = embedding_name if tied else f"{names[id(head)]}.weight"
    outside = [n for n, _ in model.named_parameters() if not n.startswith(inside)]
    outside = [n for n in outside if n not in (embedding_name, head_name)]

    def check(weight: str, value: Tensor) -> None:
        check_finite(weight, value, compute)

    resident = sum(load_buffer(model, buffer, checkpoint[buffer], device) for buffer in saved_buffers(model))
    resident += load_whole(model, outside, Tensors(checkpoint, {}), device, check)
    table = checkpoint[embedding_name]
    assert isinstance(table, Plain)
    embedding.weight = hollow(embedding.weight, device)
    if tied:
        head.weight = embedding.weight
    embedding.forward = LookedUp(embedding, table)
    relay = Relay(model, list(layers.values()))
    return Streamed(model, relay, tuple(layers), checkpoint, embedding_name, head_name, device, resident)


def _accept(_name: str, _value: Tensor) -> None:
    """Take a variant's tensor as it is: it was checked when the variant was made or read."""


@torch.inference_mode()
def inspect(stream: Streamed, compute: str, *, folds: bool = False) -> tuple[Description, Head]:
    """Return the model's description and its head but for the matrix, found in one pass over a few tokens.

    With `folds` the first layer of each kind is read again, to see what takes its inputs' scales.

    Raises:
        UsageError: a weight is not finite, or the model computes between its layers.
        QevalError: the head is of a kind that qeval does not know.
    """
    head = stream.model.get_output_embeddings()
    empty, stored = head.weight, stream.checkpoint[stream.head_name]
    tied = empty is stream.model.get_input_embeddings().weight
    part = torch.empty(min(_PROBE_ROWS, stored.shape[0]), stored.shape[1], dtype=empty.dtype, device=stream.device)
    stored.decode(stored.fetch(0, len(part)), part)
    bias = head.bias
    weights = stream.weights()

    def turn(index: int) -> None:
        weights.install(index, None, lambda name, value: check_finite(name, value, compute))

    stream.relay.every_layer(turn, weights.remove)
    try:
        head._parameters["weight"] = nn.Parameter(part, requires_grad=False)
        if bias is not None:
            head._parameters["bias"] = nn.Parameter(bias[: len(part)], requires_grad=False)
        found = head_of(stream.model)
        stream.relay.check_alone()
        stream.relay.every_layer(turn, weights.remove)
        description = describe_model(stream.model, folds=folds, probed_at=partial(_probed_at, stream))
    finally:
        head._parameters["weight"], head._parameters["bias"] = empty, bias
        weights.close()
    return replace(description, tied=tied), replace(found, weight=empty, bias=bias)


@contextmanager
def _probed_at(stream: Streamed, layer: int) -> Iterator[Probe]:
    """Run a few tokens through one layer, whose weights are in memory for the length of the block."""
    ids = probe_tokens(stream.model, stream.device)
    given: States | None = None
    with closing(layers_in_turn(stream.weights(), range(layer + 1))) as turns:
        for index in itertools.islice(turns, layer):
            given = stream.relay.run(index, given, None, ids)
        next(turns)

        def probe() -> Tensor:
            return stream.relay.run(layer, given, None, ids)[0].float()

        yield probe


@contextmanager
def scaled_inputs(stream: Streamed, variant: SavedVariant) -> Iterator[None]:
    """Turn linears' inputs and multiply them by scales, as a variant says."""
    with ExitStack() as stack:
        for name, core in variant.input_rotations.items():
            for module in modules_of(stream.model, name):
                stack.callback(turn_input(module, core, stream.device).remove)
        for name, scales in variant.input_scales.items():
            for module in modules_of(stream.model, name):
                stack.enter_context(scaled_input(module, scales.to(stream.device)))
        yield


def streamed_head_shapes(stream: Streamed) -> list[HeadShape]:
    """Return the shapes of the keys and values of a streamed model, all of whose layers are read for that.

    Raises:
        UsageError: as `check_cache`.
    """
    weights = stream.weights()
    stream.relay.every_layer(lambda index: weights.install(index, None), weights.remove)
    with closing(weights):
        return check_cache(stream.model, stream.device)


class StreamBackend:
    """Streams a model or its variants under a limit on memory, one at a time."""

    name = "torch"
    fake_quantizes = True

    def __init__(self, stream: Streamed, description: Description, settings: Head, max_bytes: int) -> None:
        """`settings` is the head but for its matrix; `max_bytes` may be taken by weights, activations and logits.

        Raises:
            UsageError: one layer does not fit.
        """
        self.stream, self._description, self.settings = stream, description, settings
        config, itemsize = stream.model.config, settings.weight.element_size()
        weights = stream.weights()
        largest = weights.largest_bytes
        weights.close()
        width = max(int(settings.weight.shape[1]), int(config.get_text_config().hidden_size))
        activations = token_activations(config.get_text_config(), itemsize)
        handed = stream.relay.state_bytes
        self.budget = Budget(max_bytes, largest, stream.resident, width, activations, handed_bytes=handed)
        self.budget.check()
        self.sharing = proven(stream.model, stream.relay, stream.weights(), self._session_of_baseline)
        self._baseline: StreamSession | None = None
        self._is_lent = False

    @property
    def warnings(self) -> list[str]:
        """The faults that the trial of shared prefixes and packed batches found, if any."""
        return [self.sharing.warning] if self.sharing.warning else []

    @property
    def shares_prefixes(self) -> bool:
        """Return whether the trial at load found a way to share prefixes."""
        return self.sharing.prefixes

    @property
    def memory_limit(self) -> int:
        """Bytes that weights, activations and logits may take."""
        return self.budget.total

    def identity(self, target: Target) -> dict[str, Any]:
        """Return nothing: rows of a streamed model are those of the same model in memory."""
        return {}

    def prepare(self, progress: Progress) -> None:
        """Do nothing: layers are read as they are run."""

    def describe(self, session: StreamSession, target: Target) -> None:
        """Return None: the run's environment says how torch runs."""

    def over(self, stream: Streamed, description: Description) -> "StreamBackend":
        """Return a backend of the same limits over a stream of the same model with other weights."""
        other = copy(self)
        other.stream, other._description, other._baseline = stream, description, None
        return other

    def change_weights(self, change: Callable[[str, Tensor], None]) -> None:
        """Change each weight of a layer in place, whenever it is read."""
        self.stream = replace(self.stream, change=change)

    def reserve(self, positions: int, schemes: Sequence[Scheme] = ()) -> None:
        """Count the final states of a job of so many positions too, and the copies that rounding by schemes makes.

        Raises:
            UsageError: too little is left.
        """
        config, itemsize = self.stream.model.config.get_text_config(), self.settings.weight.element_size()
        rounding = max((rounding_bytes(config, scheme) for scheme in schemes), default=0)
        state_bytes = positions * self.budget.width * _STATE_BYTES
        activations = token_activations(config, itemsize) + rounding
        self.budget = replace(self.budget, state_bytes=state_bytes, token_activations=activations)
        self.budget.check()

    @property
    def batch_tokens(self) -> int:
        """Tokens a batch: as without streaming where memory allows."""
        config, itemsize = self.stream.model.config.get_text_config(), self.settings.weight.element_size()
        return min(self.budget.batch_tokens, batch_tokens(config, itemsize, self.stream.device))

    @property
    def logit_rows(self) -> int:
        """The positions whose logits memory holds at a time."""
        return max(1, self.budget.logits // (LOGIT_ARRAYS * 4 * int(self.settings.weight.shape[0])))

    @property
    def head(self) -> Head | StreamedHead:
        """The baseline's own head."""
        return self._head(None)

    def head_for(self, target: Target) -> Head | StreamedHead:
        """Return the baseline's head; a variant's is wanted where another backend is compared with it.

        Raises:
            UsageError: The target is a variant.
        """
        if target is None:
            return self._head(None)
        name = target.folder.name if isinstance(target, Saved) else target.key
        raise UsageError(f"'{name}' is compared with another backend, which --stream can't; leave it out.")

    @contextmanager
    def open(self, target: Target) -> Iterator[StreamSession]:
        """Open a saved variant, or the baseline, which keeps what it ran ahead until a variant is opened.

        Raises:
            QevalError: A variant is open, or the target is one in memory.
        """
        if self._is_lent:
            raise QevalError("The model's weights are those of another variant; close its session first.")
        if target is None:
            if self._baseline is None:
                self._baseline = self._session(None)
            yield self._baseline
            return
        if not isinstance(target, Saved):
            raise QevalError(f"A streamed model opens variants from their folders, and '{target.key}' is in memory.")
        self.close()
        self._is_lent = True
        variant = saved_variant(target.folder, target.scheme)
        session = self._session(variant)
        try:
            with ExitStack() as stack:
                stack.enter_context(self.stream.outside_of(variant))
                stack.enter_context(scaled_inputs(self.stream, variant))
                formats, device = variant.rounded_inputs, self.stream.device
                stack.enter_context(rounded_inputs(self.stream.model, formats, variant.ranges, device))
                yield session
        finally:
            session.close()
            self._is_lent = False

    def close(self) -> None:
        """Let go of what the baseline's session holds."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None

    def _session_of_baseline(self, sharing: Sharing) -> StreamSession:
        """Return a session of the float model that shares as it is told to."""
        stream = self.stream
        weights, head = stream.weights(), self._head(None)
        return StreamSession(stream.model, stream.relay, weights, head, self.budget, sharing)

    def _session(self, variant: SavedVariant | None) -> StreamSession:
        scheme, ranges = (variant.scheme, variant.ranges) if variant else (Scheme(), {})
        return StreamSession(
            self.stream.model,
            self.stream.relay,
            self.stream.weights(variant),
            self._head(variant),
            self.budget,
            self.sharing,
            kv_changes(self.stream.model, scheme, ranges, self.stream.device),
        )

    def _head(self, variant: SavedVariant | None) -> Head | StreamedHead:
        names = (self._description.head, self.stream.head_name)  # a tied head goes by the embedding's name too
        replaced = next((variant.tensors[name] for name in names if name in variant.tensors), None) if variant else None
        stored = replaced or self.stream.checkpoint[self.stream.head_name]
        return head_of_parts(stored, self.settings, self.budget.head, self.stream.device)
