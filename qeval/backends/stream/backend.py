"""Opens a weightless model as sessions: the baseline's, or a saved variant's, read from its packed form."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qeval.backends.memory import batch_tokens, token_activations
from qeval.backends.stream.budget import Budget
from qeval.backends.stream.head import StreamedHead, head_of_parts
from qeval.backends.stream.packed import SavedVariant, saved_variant
from qeval.backends.stream.relay import Relay
from qeval.backends.stream.session import LOGIT_ARRAYS, StreamSession
from qeval.backends.stream.weights import LayerWeights, LookedUp, Tensors, layers_in_turn, load_buffer, load_whole
from qeval.backends.torch import scaled_input
from qeval.errors import QevalError, UsageError
from qeval.models.graph import Description, Probe, describe
from qeval.models.head import Head, head_of
from qeval.models.load import check_finite
from qeval.models.places import kept_buffers, places_of
from qeval.models.reader import Plain, Stored
from qeval.models.trace import decoder_layers, probe_tokens
from qeval.models.weights import TensorEntry
from qeval.quant.variant import Variant

_STATE_BYTES = 4
_PROBE_ROWS = 256
"""Rows of the head that it is checked with."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """A weightless model that can run: what lies outside its decoder layers is in memory, the layers are not."""

    model: Any
    relay: Relay
    layers: tuple[str, ...]
    checkpoint: Mapping[str, Stored]
    head_name: str
    device: torch.device
    resident: int
    """Bytes of the parameters outside the layers."""

    def weights(self, variant: SavedVariant | None = None) -> LayerWeights:
        """The decoder layers' weights, a variant's in place of the model's own."""
        tensors = Tensors(self.checkpoint, variant.tensors if variant else {})
        return LayerWeights(self.model, self.layers, tensors, self.device)


def streamed(model: Any, entries: list[TensorEntry], device: torch.device, compute: str) -> Streamed:
    """Make a weightless model run: its embedding looks rows up in the file, the few weights outside layers are loaded.

    Raises:
        UsageError: its decoder is no plain list of layers, the checkpoint is not its own, or a weight is not finite.
    """
    name, layers = decoder_layers(model)
    checkpoint = places_of(model, entries, str(entries[0].path.parent)).stored
    names = {id(module): module_name for module_name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding_name = f"{names[id(embedding)]}.weight"
    head_name = embedding_name if tied else f"{names[id(head)]}.weight"
    outside = [n for n, _ in model.named_parameters() if not n.startswith(f"{name}.")]
    outside = [n for n in outside if n not in (embedding_name, head_name)]

    def check(weight: str, value: Tensor) -> None:
        check_finite(weight, value, compute)

    for buffer in kept_buffers(model):
        load_buffer(model, buffer, checkpoint[buffer], device)
    resident = load_whole(model, outside, Tensors(checkpoint, {}), device, check)
    table = checkpoint[embedding_name]
    assert isinstance(table, Plain)
    embedding.forward = LookedUp(embedding, table)
    layer_names = tuple(f"{name}.{index}" for index in range(len(layers)))
    return Streamed(model, Relay(model, list(layers)), layer_names, checkpoint, head_name, device, resident)


@torch.inference_mode()
def inspect(made: Streamed, compute: str, *, folds: bool = False) -> tuple[Description, Head]:
    """The model's description and its head but for the matrix, found in one pass over a few tokens.

    With `folds` the first layer of each kind is read again, to see what takes its inputs' scales.

    Raises:
        UsageError: a weight is not finite, or the model computes between its layers.
        QevalError: the head is of a kind that qeval does not know.
    """
    head = made.model.get_output_embeddings()
    empty, stored = head.weight, made.checkpoint[made.head_name]
    tied = empty is made.model.get_input_embeddings().weight
    part = torch.empty(min(_PROBE_ROWS, stored.shape[0]), stored.shape[1], dtype=empty.dtype, device=made.device)
    stored.decode(stored.fetch(0, len(part)), part)
    bias = head.bias
    weights = made.weights()
    made.relay.every_layer(
        lambda index: weights.install(index, None, lambda name, value: check_finite(name, value, compute)),
        weights.remove,
    )
    try:
        head._parameters["weight"] = nn.Parameter(part, requires_grad=False)
        if bias is not None:
            head._parameters["bias"] = nn.Parameter(bias[: len(part)], requires_grad=False)
        found = head_of(made.model)
        description = describe(made.model, folds=folds, probed_at=partial(_probed_at, made))
    finally:
        head._parameters["weight"], head._parameters["bias"] = empty, bias
        weights.close()
    return replace(description, tied=tied), replace(found, weight=empty, bias=bias)


@contextmanager
def _probed_at(made: Streamed, layer: int) -> Iterator[Probe]:
    """A few tokens through one layer, whose weights are in memory for the length of the block."""
    ids = probe_tokens(made.model, made.device)
    given: Tensor | None = None
    with closing(layers_in_turn(made.weights(), range(layer + 1))) as turns:
        for index in itertools.islice(turns, layer):
            given = made.relay.run(index, given, None, ids)
        next(turns)

        def probe() -> Tensor:
            return made.relay.run(layer, given, None, ids)[0].float()

        yield probe


class StreamBackend:
    """Streams a model or its variants under a limit on memory, one at a time."""

    name = "torch"

    def __init__(self, made: Streamed, description: Description, settings: Head, max_bytes: int) -> None:
        """`settings` is the head but for its matrix; `max_bytes` may be taken by weights, activations and logits.

        Raises:
            UsageError: one layer does not fit.
        """
        self.made, self._description, self._settings = made, description, settings
        config, itemsize = made.model.config, settings.weight.element_size()
        weights = made.weights()
        largest = weights.largest_bytes
        weights.close()
        width = int(settings.weight.shape[1])
        activations = token_activations(config.get_text_config(), itemsize)
        self.budget = Budget(max_bytes, largest, made.resident, width, itemsize, activations)
        self.budget.check()
        self._baseline: StreamSession | None = None
        self._is_lent = False

    def reserve(self, positions: int) -> None:
        """Count the final states of a job of so many positions too.

        Raises:
            UsageError: too little is left.
        """
        kept = positions * self.budget.width * _STATE_BYTES
        self.budget = replace(self.budget, kept=kept)
        self.budget.check()

    @property
    def batch_tokens(self) -> int:
        """Tokens a batch: as without streaming where memory allows."""
        config, itemsize = self.made.model.config.get_text_config(), self._settings.weight.element_size()
        return min(self.budget.batch_tokens, batch_tokens(config, itemsize, self.made.device))

    @property
    def logit_rows(self) -> int:
        """The positions whose logits memory holds at a time."""
        return max(1, self.budget.logits // (LOGIT_ARRAYS * 4 * int(self._settings.weight.shape[0])))

    @property
    def head(self) -> Head | StreamedHead:
        """The baseline's own head."""
        return self._head(None)

    def head_for(self, variant: Variant) -> Head | StreamedHead:
        """Refused: the head of a variant in memory is wanted where another backend is compared with.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"'{variant.key}' is compared with another backend, which --stream can't; leave it out.")

    @contextmanager
    def open(self, variant: None) -> Iterator[StreamSession]:
        """The baseline's session, which keeps what it ran ahead until a variant's is opened.

        Raises:
            QevalError: a variant is open.
        """
        if variant is not None or self._is_lent:
            raise QevalError("The model's weights are those of another variant; close its session first.")
        if self._baseline is None:
            self._baseline = self._session(None)
        yield self._baseline

    @contextmanager
    def open_saved(self, folder: Path) -> Iterator[StreamSession]:
        """The session of the variant that lies in `folder`.

        Raises:
            QevalError: another variant is open.
        """
        if self._is_lent:
            raise QevalError("The model's weights are those of another variant; close its session first.")
        self.close()
        self._is_lent = True
        variant = saved_variant(folder)
        session = self._session(variant)
        try:
            with ExitStack() as stack:
                for name, scales in variant.input_scales.items():
                    module = self.made.model.get_submodule(name.removesuffix(".weight"))
                    stack.enter_context(scaled_input(module, scales.to(self.made.device)))
                yield session
        finally:
            session.close()
            self._is_lent = False

    def close(self) -> None:
        """Let go of what the baseline's session holds."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None

    def _session(self, variant: SavedVariant | None) -> StreamSession:
        return StreamSession(
            self.made.model, self.made.relay, self.made.weights(variant), self._head(variant), self.budget
        )

    def _head(self, variant: SavedVariant | None) -> Head | StreamedHead:
        names = (self._description.head, self.made.head_name)  # a tied head goes by the embedding's name too
        own = next((variant.tensors[name] for name in names if name in variant.tensors), None) if variant else None
        stored = own or self.made.checkpoint[self.made.head_name]
        return head_of_parts(stored, self._settings, self.budget.head, self.made.device)
