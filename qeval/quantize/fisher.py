"""The predicted sensitivity of each group of linears, by one pass forward and one back: KL to second order.

With y = W x a linear's output at a token, E the error of its quantized weights and g the gradient at y of the
log-probability of labels drawn from the model itself, KL(baseline || quantized) is about half the mean of (g . E x)^2:
the labels' own mean makes g g^T the Fisher information (Amari 1998; Martens, *New insights on the natural gradient
method*, JMLR 2020, section 9). Errors at different tokens are taken as unrelated. It is a proposal, not a measurement.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qeval.arithmetic import wide_total, with_fp64
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.head import Head
from qeval.models.structure.weight_views import After, is_expert, watch_products, weights_of
from qeval.progress import Advance, in_parts
from qeval.quantize.sensitivity import Effective, trial_passes

FISHER_SAMPLES, FISHER_LENGTH = 4, 256
"""Calibration tokens that the prediction comes from, one sample at a time."""
POSITIONS = 128
"""Positions whose logits are made at a time."""


class Back(Protocol):
    """A head that gradients go back through: see `Head`."""

    @property
    def scale(self) -> float:
        """The factor of the product."""
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
    """Predict the mean KL in nats of every group quantized alone, by the group's first name.

    Args:
        model: The float model.
        description: Its structure.
        head: Its output projection.
        samples: Token ids of the calibration text, of which the first `FISHER_SAMPLES` are used.
        effective: Returns a group's quantized matrices as they act in the unfolded model; where it returns none, or no
            token reaches the group, the KL is 0.
        advance: Called with `trial_passes` in all, a share after each sample.
        seed: Draws the labels.
    """
    weights = weights_of(model)
    watched = [Watched(weights, group, effective) for group in description.units]
    generator = torch.Generator().manual_seed(seed)  # the CPU's, so that the labels are the same on every device
    final_states = FinalStates(model)
    texts = [sample[:FISHER_LENGTH] for sample in samples[:FISHER_SAMPLES]]
    done = in_parts(advance, trial_passes(description), len(texts))

    # gradients start at the embedding's output, so that none is computed for a weight
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
        after = {name: call for each in watched for name, call in each.listeners().items()}
        hooks.enter_context(watch_products(model, after=after))
        embedding = model.get_submodule(description.embedding.removesuffix(".weight"))
        hooks.callback(embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_().clone()).remove)
        for text in texts:
            ids = torch.tensor([list(text)], device=model.device)
            states = final_states(ids)
            torch.autograd.backward(states, label_gradient(head, states.detach(), generator))
            for each in watched:
                each.end_pass()
            done()
    return {each.name: each.total / (2 * sum(map(len, texts))) for each in watched}


def label_gradient(head: Back, states: Tensor, generator: torch.Generator, positions: int = POSITIONS) -> Tensor:
    """Return the gradient at `states` of the log-probability of one label a position, drawn from the model.

    Args:
        head: The output projection.
        states: Final hidden states [..., d_model].
        generator: Draws the labels, on the CPU.
        positions: How many go through the head at a time; the labels don't depend on it, nor on the device.
    """
    flat = states.reshape(-1, states.shape[-1])
    parts = [_label_gradient_of(head, part, generator) for part in torch.split(flat, positions)]
    return torch.cat(parts).reshape(states.shape)


@torch.no_grad()
def _label_gradient_of(head: Back, states: Tensor, generator: torch.Generator) -> Tensor:
    logits = head.logits(states)
    p = logits.softmax(-1)
    labels = _draw(p, generator)
    back = p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))
    if head.cap is not None:
        back.mul_(1 - (logits / head.cap).square_())
    return head.transposed(back.mul_(head.scale)).to(states.dtype)


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label [n, 1] from each row of `p` [n, vocab], by where a uniform number falls in the running sum."""
    reached = with_fp64(p).double().cumsum(-1)
    level = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(reached.device)
    labels = torch.searchsorted(reached, level * reached[:, -1:]).clamp_(max=p.shape[-1] - 1)
    return labels.to(p.device)


class Watched:
    """One group's part in a pass: its input on the way forward, what its error would have moved on the way back.

    `name` is the group's first; `total`: the sum over tokens of the square of what the labels' log-probability would
    have moved by.
    """

    def __init__(self, weights: Mapping[str, Tensor], group: Group, effective: Effective) -> None:
        """Watch `group` from the next pass on; `weights` and `effective` are read on the way back."""
        self.name, self.total = group.names[0], 0.0
        self._weights, self._group, self._effective = weights, group, effective
        self._errors: dict[str, Tensor] | None = None
        self._uses: Counter[str] = Counter()  # of each linear in the pass, so far without their way back
        self._moved: Tensor | None = None  # [1, tokens]

    def listeners(self) -> dict[str, After]:
        """Return what each linear of the group calls after it ran."""
        return {name: self._forward(name) for name in self._group.names}

    def end_pass(self) -> None:
        """Add what the pass that ended has moved to the total."""
        if self._moved is not None:
            self.total += wide_total(self._moved.square())
        self._moved = self._errors = None
        self._uses.clear()

    def _forward(self, name: str) -> After:
        def forward(inputs: Tensor, output: Tensor) -> None:
            if not output.requires_grad:  # HRM's early cycles run without gradients
                return
            inputs = inputs.detach()
            self._uses[name] += 1
            output.register_hook(lambda gradient: self._backward(name, inputs, gradient))  # type: ignore[no-untyped-call]

        return forward

    @torch.no_grad()
    def _backward(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        if self._errors is None:
            values = self._effective(self._group)
            self._errors = {key: value - self._weights[key] for key, value in values.items()}

        self._uses[name] -= 1
        error = self._errors.get(name) if self._uses[name] else self._errors.pop(name, None)
        if error is not None:
            moved = (nn.functional.linear(inputs, error.to(inputs.dtype)) * gradient).sum(-1, dtype=torch.float32)
            if is_expert(name):  # other tokens than its neighbours'
                self.total += wide_total(moved.square())
            else:
                self._moved = moved if self._moved is None else self._moved + moved
