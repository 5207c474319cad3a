"""The head: final hidden states to logits, soft caps and logit scales included."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qeval.errors import QevalError, UsageError
from qeval.models.structure.forward import whole_pass
from qeval.models.structure.precision import wide_product
from qeval.parsing import error_reason

_TOLERANCES = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Of the model's own logits, which it rounds to its type; relative to the largest."""
_TOLERANCE = 2e-5
"""In fp32: a cap of 30 on logits of 1, gone unseen, is ten times as much."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""The names in configurations for the cap of the logits: Gemma's, RecurrentGemma's, xLSTM's."""


@dataclass(frozen=True, eq=False)
class Head:
    """The map of states to logits: `cap(scale * gains * (states @ weight.T + bias))`.

    `weight` [vocab, d_model] is the model's own tensor; `gains` [vocab] fp32 are a factor of each token's logit (Dory).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    gains: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return int(self.weight.shape[0])

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of `states` [n, d_model], on the weight's device wherever the states are.

        Half-precision weights are multiplied into fp32, so that no logit is rounded.
        """
        logits = wide_product(states.to(self.weight.device), self.weight, self.bias)
        if self.gains is not None:
            logits.mul_(self.gains)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def transposed(self, back: Tensor) -> Tensor:
        """Multiply `back` [n, vocab] by gains and matrix the other way: [n, d_model] in the weight's type."""
        if self.gains is not None:
            back = back * self.gains
        return back.to(self.weight.dtype) @ self.weight


@torch.inference_mode()
def head_of(model: Any) -> Head:
    """Return the head of a causal language model, checked against the model's own logits on a few tokens.

    Raises:
        UsageError: The configuration can't be run, or gives logits that are not finite.
        QevalError: The model turns hidden states into logits in a way that qeval doesn't know.
    """
    try:
        return _checked_head(model)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{type(model).__name__} can't be run as its config.json says ({error_reason(error)}); download it again."
        ) from error


def _checked_head(model: Any) -> Head:
    """Return the head, once its logits are the model's own."""
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    cap = next((getattr(config, name) for name in _CAPS if getattr(config, name, None)), None)
    gains = getattr(linear, "logit_scale", None)
    if gains is not None:
        gains = gains.float() * linear.logit_scale_factor
    head = Head(linear.weight, linear.bias, scale, cap, gains)

    # the model's own logits on a few tokens must be the head's
    tokens = torch.arange(1, 9, device=linear.weight.device).unsqueeze(0) % linear.weight.shape[0]
    expected, states = whole_pass(model, tokens)
    expected, logits = expected.float(), head.logits(states)

    if not torch.isfinite(expected).all():
        raise UsageError(
            f"{type(model).__name__} gives logits that are not finite in {linear.weight.dtype}: its config.json or its "
            "weights are broken, or --compute fp32 is needed."
        )
    tolerance = _TOLERANCES.get(linear.weight.dtype, _TOLERANCE)
    if not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise QevalError(
            f"{type(model).__name__} turns hidden states into logits in a way that qeval does not know, "
            "so its scores would be wrong; please report the model."
        )
    return head
