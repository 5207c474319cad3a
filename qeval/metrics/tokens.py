"""What a variant's next-token distributions differ in from the baseline's, one number a position.

Everything comes from one sweep over a block of logits: log-softmax in fp32, sums in fp64. Nothing is clipped: a
KL-divergence that rounding leaves a hair below zero stays so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

_BLOCK_NUMBERS = 1 << 23
"""Logits of one model in memory at a time (32 MiB), so that peak memory does not grow with window or vocabulary."""


@dataclass(frozen=True, eq=False)
class Own:
    """A model's own numbers at n positions: `log_p` fp64 of the target token (NaN where there is none), `entropy`."""

    log_p: Tensor
    entropy_nats: Tensor


@dataclass(frozen=True, eq=False)
class Distance:
    """A variant against the baseline at n positions, fp64 but for `top1_agreement` (bool)."""

    kl_nats: Tensor
    reverse_kl_nats: Tensor
    kl_abs_modelopt: Tensor
    top1_agreement: Tensor
    own: Own
    base_log_p: Tensor


def own_numbers(logits: Logits, states: Tensor, targets: Tensor) -> Own:
    """The log-probability of each position's target token (-1: none) and the distribution's entropy.

    `states` [n, width] go through `logits` in blocks; `targets` [n] token ids.
    """
    parts = [_own(_log_softmax(logits(s)), t) for s, t in _blocks(logits, states, targets)]
    return Own(torch.cat([p.log_p for p in parts]), torch.cat([p.entropy_nats for p in parts]))


def distance(base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor, targets: Tensor) -> Distance:
    """The distances of a variant's distributions from the baseline's, position by position."""
    parts = [
        _distance(_log_softmax(base_logits(b)), _log_softmax(logits(s)), t)
        for b, s, t in _blocks(base_logits, base_states, states, targets)
    ]
    return Distance(
        kl_nats=torch.cat([p.kl_nats for p in parts]),
        reverse_kl_nats=torch.cat([p.reverse_kl_nats for p in parts]),
        kl_abs_modelopt=torch.cat([p.kl_abs_modelopt for p in parts]),
        top1_agreement=torch.cat([p.top1_agreement for p in parts]),
        own=Own(torch.cat([p.own.log_p for p in parts]), torch.cat([p.own.entropy_nats for p in parts])),
        base_log_p=torch.cat([p.base_log_p for p in parts]),
    )


def mean_kl(base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor) -> float:
    """The mean KL(base || other) in nats over n positions, and nothing else."""
    total = 0.0
    for base, state in _blocks(base_logits, base_states, states):
        log_p, log_q = _log_softmax(base_logits(base)), _log_softmax(logits(state))
        total += float(log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(dtype=torch.float64))
    return total / len(states)


def _distance(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Distance:
    own, base = _own(log_q, targets), _target(log_p, targets)
    agreement = log_p.argmax(-1) == log_q.argmax(-1)
    difference = log_p - log_q
    q = log_q.exp_()
    reverse = -_sum(q.mul_(difference))
    weighted = log_p.exp_().mul_(difference)
    return Distance(_sum(weighted), reverse, _sum(weighted.abs_()), agreement, own, base)


def _own(log_p: Tensor, targets: Tensor) -> Own:
    return Own(_target(log_p, targets), -_sum(log_p.exp().mul_(log_p)))


def _target(log_p: Tensor, targets: Tensor) -> Tensor:
    found = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).double()
    return found.masked_fill(targets < 0, torch.nan)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64)


def _blocks(logits: Logits, states: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    vocabulary = logits(states[:1]).shape[-1]
    rows = max(1, _BLOCK_NUMBERS // vocabulary)
    return zip(*(torch.split(tensor, rows) for tensor in (states, *others)), strict=True)
