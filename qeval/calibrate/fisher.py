"""How much each group of linears would matter, from a pass forward and one back over a little text: KL to second order.

With y = W x a linear's output at a token, E the error of its quantized weights and g the gradient at y of the
log-probability of labels drawn from the model itself, KL(baseline || quantized) is about half the mean of (g . E x)^2:
the labels' own mean makes g g^T the Fisher information (Amari 1998; Martens, *New insights on the natural gradient
method*, JMLR 2020, section 9). Errors at different tokens are taken as unrelated. It is a proposal, not a measurement.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qeval.calibrate.sensitivity import Effective, trial_passes
from qeval.models.graph import Description, Group
from qeval.models.head import Head
from qeval.models.matrices import After, is_expert, watching, weights_of
from qeval.progress import Advance, in_parts

SAMPLES, LENGTH = 4, 256
"""Calibration tokens that the prediction comes from, one sample at a time."""
POSITIONS = 128
"""Positions whose logits are made at a time."""


class Back(Protocol):
    """A head that gradients go back through: see `Head`."""

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        ...

    @property
    def cap(self) -> float | None:
        """The soft cap of the logits."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits [n, vocab] of `states` [n, d_model]."""
        ...

    def transposed(self, back: Tensor) -> Tensor:
        """`back` [n, vocab] through the matrix the other way."""
        ...


def predict(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    effective: Effective,
    advance: Advance,
    seed: int = 0,
) -> dict[str, float]:
    """The predicted mean KL in nats of every group quantized alone, by the group's first name.

    `effective` gives a group's quantized matrices as they act in the unfolded model; where it gives none, or no token
    reaches the group, the KL is 0. `seed` draws the labels. `advance` is told `trial_passes` in all, a share after
    each sample.
    """
    weights = weights_of(model)
    watched = [Watched(weights, group, effective) for group in description.units]
    generator = torch.Generator(model.device).manual_seed(seed)
    texts = [sample[:LENGTH] for sample in samples[:SAMPLES]]
    done = in_parts(advance, trial_passes(description), len(texts))
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
        after = {name: call for each in watched for name, call in each.listeners().items()}
        hooks.enter_context(watching(model, after=after))
        embedding = model.get_submodule(description.embedding.removesuffix(".weight"))
        hooks.callback(embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_()).remove)
        for text in texts:
            ids = torch.tensor([list(text)], device=model.device)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            states.backward(label_gradient(head, states.detach(), generator))
            for each in watched:
                each.end_pass()
            done()
    return {each.name: each.total / (2 * sum(map(len, texts))) for each in watched}


def label_gradient(head: Back, states: Tensor, generator: torch.Generator, positions: int = POSITIONS) -> Tensor:
    """The gradient at `states` [..., d_model] of the log-probability of one label a position, drawn from the model.

    `positions` go through the head at a time; the labels that a generator draws depend on it.
    """
    flat = states.reshape(-1, states.shape[-1])
    parts = [_label_gradient_of(head, part, generator) for part in torch.split(flat, positions)]
    return torch.cat(parts).reshape(states.shape)


@torch.no_grad()
def _label_gradient_of(head: Back, states: Tensor, generator: torch.Generator) -> Tensor:
    logits = head.logits(states)
    p = logits.softmax(-1)
    labels = torch.multinomial(p, 1, generator=generator)
    back = p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))
    if head.cap is not None:
        back.mul_(1 - (logits / head.cap).square_())
    return head.transposed(back.mul_(head.scale)).to(states.dtype)


class Watched:
    """One group's part in a pass: its input on the way forward, what its error would have moved on the way back.

    `name` is the group's first; `total`: the sum over tokens of the square of what the labels' log-probability would
    have moved by.
    """

    def __init__(self, weights: Mapping[str, Tensor], group: Group, effective: Effective) -> None:
        """Nothing is watched yet; `weights` are looked at on the way back; `effective`: what quantized ones do."""
        self.name, self.total = group.names[0], 0.0
        self._weights, self._group, self._effective = weights, group, effective
        self._errors: dict[str, Tensor] | None = None
        self._moved: Tensor | None = None  # [1, tokens]

    def listeners(self) -> dict[str, After]:
        """What each linear of the group is to call after it ran."""
        return {name: self._forward(name) for name in self._group.names}

    def end_pass(self) -> None:
        """Take in what the pass that ended has moved."""
        if self._moved is not None:
            self.total += float(self._moved.square().sum(dtype=torch.float64))
        self._moved = self._errors = None

    def _forward(self, name: str) -> After:
        def forward(given: Tensor, output: Tensor) -> None:
            given = given.detach()
            output.register_hook(lambda gradient: self._backward(name, given, gradient))  # type: ignore[no-untyped-call]

        return forward

    @torch.no_grad()
    def _backward(self, name: str, given: Tensor, gradient: Tensor) -> None:
        if self._errors is None:
            found = self._effective(self._group)
            self._errors = {key: value - self._weights[key] for key, value in found.items()}
        error = self._errors.pop(name, None)
        if error is not None:
            moved = (nn.functional.linear(given, error.to(given.dtype)) * gradient).sum(-1, dtype=torch.float32)
            if is_expert(name):  # other tokens than its neighbours'
                self.total += float(moved.square().sum(dtype=torch.float64))
            else:
                self._moved = moved if self._moved is None else self._moved + moved
