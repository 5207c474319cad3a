"""A model's numbers along text that is forced on it: log-probabilities, distances, and the mass on sets of tokens.

Log-softmax is in fp32, sums are in fp64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.arithmetic import row_sums
from qeval.metrics.tokens import Logits, on_one_device

BITS = 8
"""Tokens of a byte of a packed mask."""


@dataclass(frozen=True, eq=False)
class TraceNumbers:
    """A model's numbers at n positions, on the CPU.

    Attributes:
        pred: The most likely token, the first of equals; int64 [n].
        log_p: The log-probability of the token that is forced, NaN where there is none; fp64 [n].
        kl_nats: KL(baseline || model), fp64 [n]; None for the baseline itself.
        masses: The probability of each set of tokens, fp64 [sets, n].
        leak: The probability outside each position's mask, fp64 [n]; None without masks.
    """

    pred: Tensor
    log_p: Tensor
    kl_nats: Tensor | None
    masses: Tensor
    leak: Tensor | None


@dataclass(frozen=True, eq=False)
class Probes:
    """The token and the sets of tokens that are looked for at n positions of a trace.

    Attributes:
        targets: The token that is forced, -1 where there is none; int64 [n].
        sets: Sets of tokens whose mass is summed; bool [sets, tokens].
        masks: The tokens that a grammar allows, eight a byte, the first in the lowest bit; uint8 [n, bytes], or None.
    """

    targets: Tensor
    sets: Tensor
    masks: Tensor | None = None


def trace_numbers(
    logits: Logits, states: Tensor, probes: Probes, block: int, base: tuple[Logits, Tensor] | None = None
) -> TraceNumbers:
    """Return a model's numbers along a trace.

    Args:
        logits: The model's head: states [rows, width] to logits [rows, vocabulary].
        states: The final hidden states, [n, width].
        probes: The tokens that are looked for.
        block: How many positions go through the head at a time.
        base: The baseline's head and states [n, width]; None for the baseline itself.
    """
    rows = len(states)
    pred = torch.empty(rows, dtype=torch.int64)
    log_p, kl, leak = (torch.empty(rows, dtype=torch.float64) for _ in range(3))
    masses = torch.empty((len(probes.sets), rows), dtype=torch.float64)
    for start in range(0, rows, block):
        here = slice(start, start + block)
        other = logits(states[here])
        log_base = None if base is None else _log_softmax(on_one_device(base[0](base[1][here]), other))
        log_q = _log_softmax(other if log_base is None else on_one_device(other, log_base))
        p = log_q.exp()

        pred[here] = log_q.argmax(-1).cpu()
        log_p[here] = _of_targets(log_q, probes.targets[here].to(log_q.device))
        for place, tokens in enumerate(probes.sets):
            masses[place, here] = row_sums(p[:, _fitted(tokens, p.shape[-1]).to(p.device)]).cpu()
        if probes.masks is not None:
            # what lies outside is summed itself: 1 minus the rest would be lost to rounding
            allowed = _fitted(unpacked(probes.masks[here]), p.shape[-1]).to(p.device)
            leak[here] = row_sums(p.masked_fill(allowed, 0.0)).cpu()
        if log_base is not None:
            kl[here] = row_sums(log_base.exp() * (log_base - log_q)).cpu()
    return TraceNumbers(pred, log_p, None if base is None else kl, masses, None if probes.masks is None else leak)


def unpacked(masks: Tensor) -> Tensor:
    """Return packed masks as bools, [n, bytes] to [n, 8 bytes].

    >>> unpacked(torch.tensor([[5]], dtype=torch.uint8))[0, :4].tolist()
    [True, False, True, False]
    """
    bits = torch.arange(BITS, dtype=torch.uint8)
    return ((masks[..., None] >> bits) & 1).bool().flatten(-2)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _of_targets(log_q: Tensor, targets: Tensor) -> Tensor:
    values = log_q.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).double()
    return values.masked_fill(targets < 0, torch.nan).cpu()


def _fitted(tokens: Tensor, width: int) -> Tensor:
    """Return a set of tokens [..., any] over a vocabulary of `width`; ids that the tokenizer lacks are in no set."""
    lacking = width - tokens.shape[-1]
    return tokens[..., :width] if lacking <= 0 else torch.nn.functional.pad(tokens, (0, lacking))
