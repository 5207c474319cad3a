"""What a model would say greedily, against what the baseline said there; one number a position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.metrics.tokens import Logits


@dataclass(frozen=True, eq=False)
class Choices:
    """At n positions: `pred` the most likely token (int64, the first of equals), the others fp64 in nats.

    `kl_nats` is KL(base || other); `margin_nats` how much likelier, in the base's log-probability, the base's own
    choice is than `pred`: 0 where they are the same, and small where the base was of two minds.
    """

    pred: Tensor
    kl_nats: Tensor
    margin_nats: Tensor


def choices(
    base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor, chosen: Tensor, block: int
) -> Choices:
    """Both models' `states` [n, width] through their heads, `block` positions at a time; `chosen` [n]: the base's."""
    pred = torch.empty(len(states), dtype=torch.int64)
    kl, margin = (torch.empty(len(states), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(states), block):
        here = slice(start, start + block)
        log_p = torch.log_softmax(base_logits(base_states[here]), dim=-1, dtype=torch.float32)
        log_q = torch.log_softmax(logits(states[here]), dim=-1, dtype=torch.float32).to(log_p.device)
        said, wanted = log_q.argmax(-1), chosen[here].to(log_p.device)
        pred[here] = said.cpu()
        margin[here] = (_of(log_p, wanted) - _of(log_p, said)).cpu()
        kl[here] = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).cpu()
    return Choices(pred, kl, margin)


def _of(log_p: Tensor, tokens: Tensor) -> Tensor:
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()
