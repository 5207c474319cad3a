"""The head: final hidden states to logits, soft caps and logit scales included."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qeval.errors import QevalError

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Head:
    """`logits = cap(scale * (states @ weight.T + bias))`; `weight` [vocab, d_model] is the model's own tensor."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return int(self.weight.shape[0])

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits [n, vocab] of `states` [n, d_model]; the product in the weight's type."""
        logits = torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def transposed(self, back: Tensor) -> Tensor:
        """`back` [n, vocab] through the matrix the other way: [n, d_model] in the weight's type."""
        return back.to(self.weight.dtype) @ self.weight


@torch.inference_mode()
def head_of(model: Any) -> Head:
    """The head of a causal language model, checked against the model's own logits on a few tokens.

    Raises:
        QevalError: the model turns hidden states into logits in a way that qeval doesn't know.
    """
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    head = Head(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))
    tokens = torch.arange(1, 9, device=linear.weight.device).unsqueeze(0) % linear.weight.shape[0]
    expected = model(input_ids=tokens, use_cache=False).logits[0].float()
    given = head.logits(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0])
    if not torch.allclose(given, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
        raise QevalError(
            f"{type(model).__name__} turns hidden states into logits in a way that qeval does not know, "
            "so its scores would be wrong; please report the model."
        )
    return head
