"""A model's most likely tokens against the baseline's choices; one number a position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.arithmetic import row_sums
from qeval.metrics.tokens import Logits, on_one_device


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
    """Compare a model's most likely tokens with the baseline's choices.

    Args:
        base_logits: The baseline's head: states [rows, width] to logits [rows, vocabulary].
        base_states: The baseline's final hidden states, [n, width].
        logits: The model's head.
        states: The model's final hidden states, [n, width].
        chosen: The token that the baseline chose at each position, [n].
        block: How many positions go through the heads at a time.
    """
    pred = torch.empty(len(states), dtype=torch.int64)
    kl, margin = (torch.empty(len(states), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(states), block):
        here = slice(start, start + block)
        other = logits(states[here])
        base = on_one_device(base_logits(base_states[here]), other)
        log_p = torch.log_softmax(base, dim=-1, dtype=torch.float32)
        log_q = torch.log_softmax(on_one_device(other, base), dim=-1, dtype=torch.float32)
        pred_here, chosen_here = log_q.argmax(-1), chosen[here].to(log_p.device)
        pred[here] = pred_here.cpu()
        margin[here] = _of(log_p, chosen_here) - _of(log_p, pred_here)
        kl[here] = row_sums(log_p.exp() * (log_p - log_q)).cpu()
    return Choices(pred, kl, margin)


def _of(log_p: Tensor, tokens: Tensor) -> Tensor:
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).cpu().double()
