"""A streamed model rotated: its tensors take a plan's steps whenever they are read, and its logits prove the plan."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from qeval.backends.stream.backend import StreamBackend, Streamed
from qeval.backends.stream.head import head_of_parts
from qeval.backends.stream.weights import TurnedTensor
from qeval.errors import UsageError
from qeval.models.structure.graph import Description
from qeval.models.structure.trace import probe
from qeval.models.structure.weight_views import weights_of
from qeval.quant.scheme import RotationPlaces
from qeval.quant.variant import Variant
from qeval.quantize.rotating import turned_description, turned_weights, with_turned_floats
from qeval.quantize.rotation_plan import RotationPlan, WeightStep, plan_rotation


class StreamedWeights:
    """The weights of a streamed model, as `rotation_plan.Weights`."""

    def __init__(self, stream: Streamed) -> None:
        """Look at the model's parameters."""
        self.model: Any = stream.model
        self.stream = stream
        self._types = {name: weight.dtype for name, weight in weights_of(stream.model).items()}

    def whole(self, name: str) -> Tensor:
        """Read a weight, in the type that the model computes in."""
        stored = self.stream.checkpoint[name]
        dtype = self._types.get(name, self.model.get_output_embeddings().weight.dtype)  # a tied head has no own name
        value = torch.empty(stored.shape, dtype=dtype, device=self.stream.device)
        stored.decode(stored.fetch(0, stored.shape[0]), value)
        return value

    def states(self) -> Tensor:
        """Return the final states of a few fixed tokens; all layers are read for that."""
        weights = self.stream.weights()
        self.stream.relay.every_layer(lambda index: weights.install(index, None), weights.remove)
        with closing(weights):
            return probe(self.model, self.stream.device)

    @contextmanager
    def turned(self, steps: Mapping[str, Sequence[WeightStep]]) -> Iterator[None]:
        """Have weights take their steps whenever they are read inside a `with` block."""
        own = self.stream
        tensors = {name: TurnedTensor(own.checkpoint[name], each) for name, each in steps.items()}
        with own.outside_with(tensors):
            self.stream = replace(own, checkpoint={**own.checkpoint, **tensors})
            try:
                yield
            finally:
                self.stream = own


@dataclass(frozen=True, eq=False)
class RotatedStream:
    """A streamed model whose weights are turned for the length of a `with` block.

    Attributes:
        backend: Streams the turned model.
        description: Its structure.
        plan: What its weights went through.
        weights: Its weights as they are now.
        details: What was done, in words.
    """

    backend: StreamBackend
    description: Description
    plan: RotationPlan
    weights: StreamedWeights
    details: Mapping[str, str]

    def completed(self, variant: Variant) -> Variant:
        """Return a variant of the turned model as one of the float model: with every weight that turning changed."""
        changed = [*self.plan.steps, *([self.description.head] if self.plan.head else [])]
        kept = {name: self.weights.whole(name).cpu() for name in changed if name not in variant.quantized_matrices}
        return with_turned_floats(variant, kept, {}, self.details)


@torch.inference_mode()
@contextmanager
def rotated_stream(backend: StreamBackend, description: Description, places: RotationPlaces) -> Iterator[RotatedStream]:
    """Turn a streamed model's weights inside a `with` block.

    Args:
        backend: Streams the float model.
        description: Its structure, with the folds that were found.
        places: The places, and the seed of the matrices; R4 is not among them.

    Raises:
        UsageError: The model has a part that can't be turned, gives other logits when it is, or memory does not hold
            the turned embedding and head, which the variant takes whole.
    """
    weights = StreamedWeights(backend.stream)
    plan = plan_rotation(weights, description, places)
    _check_room(backend, description, plan)
    own, turned = backend.stream.checkpoint[backend.stream.head_name], None
    if plan.head:
        turned = TurnedTensor(own, plan.head)
    heads = tuple(
        head_of_parts(each, backend.settings, backend.budget.head, backend.stream.device)
        for each in (own, turned or own)
    )
    with turned_weights(weights, description, places, plan, (heads[0], heads[1])) as details:
        if turned is not None:
            checkpoint = {**weights.stream.checkpoint, description.head: turned}
            weights.stream = replace(weights.stream, checkpoint=checkpoint, head_name=description.head)
        about = turned_description(description, plan)
        yield RotatedStream(backend.over(weights.stream, about), about, plan, weights, details)


def _check_room(backend: StreamBackend, description: Description, plan: RotationPlan) -> None:
    """Refuse where memory does not hold what the variant keeps in float of embedding and head."""
    shape, names = backend.settings.weight, [description.embedding] if description.embedding in plan.steps else []
    matrices = len(names) + bool(plan.head)
    needed = matrices * prod(shape.shape) * shape.element_size()
    if needed > backend.memory_limit:
        raise UsageError(
            f"--max-memory {backend.memory_limit / 2**20:.0f}MiB does not hold the turned embedding and head of a "
            f"rotated variant; give at least {needed / 2**20 + 1:.0f}MiB."
        )
