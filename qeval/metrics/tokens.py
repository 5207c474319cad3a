"""What a variant's next-token distributions differ in from the baseline's, one number a position.

Everything comes from one sweep over a block of logits: log-softmax in fp32, sums in fp64. Nothing is clipped: a
KL-divergence that rounding leaves a hair below zero stays so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

_BLOCK_NUMBERS, _GPU_BLOCK_NUMBERS = 1 << 23, 1 << 26
"""Logits of one model in memory at a time (32 MiB), so that peak memory does not grow with window or vocabulary.

Fewer make matrix products of few rows, which are slow: at 2^22 a head of 49,152 x 576 ran at 43 GFLOP/s on a core that
reached 58 at 2^23 and 61 at 2^24."""
_SWEEP_NUMBERS = 1 << 20
"""Logits that are swept at a time on the CPU: what lies in its caches is swept up to three times as fast."""


def block_rows(vocabulary: int, device: torch.device | None = None) -> int:
    """The positions whose logits, each as wide as the vocabulary, are made at a time."""
    on_gpu = device is not None and device.type == "cuda"
    return max(1, (_GPU_BLOCK_NUMBERS if on_gpu else _BLOCK_NUMBERS) // vocabulary)


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
    twin_kl_nats: Tensor | None
    """KL from the same weights on another backend, where that was given."""


def own_numbers(logits: Logits, states: Tensor, targets: Tensor, block: int) -> Own:
    """The log-probability of each position's target token (-1: none) and the distribution's entropy.

    `states` [n, width] go through `logits` in blocks of so many; `targets` [n] token ids.
    """
    own = Own(*_empty(len(states), 2))
    for rows in _blocks(states, block):
        made = logits(states[rows])
        for part in _sweeps(made):
            here = _within(rows, part)
            _fill_own(own, here, _log_softmax(made[part]), targets[here])
    return own


def distance(
    base_logits: Logits,
    base_states: Tensor,
    logits: Logits,
    states: Tensor,
    targets: Tensor,
    block: int,
    twin: tuple[Logits, Tensor] | None = None,
) -> Distance:
    """The distances of a variant's distributions from the baseline's, `block` positions at a time.

    `twin`: the head and the states of the same weights on another backend, to be compared with in the same sweep.
    """
    kl, reverse, absolute, base_log_p, near, *own = _empty(len(states), 7)
    agreement = torch.empty(len(states), dtype=torch.bool)
    found = Distance(kl, reverse, absolute, agreement, Own(*own), base_log_p, None if twin is None else near)
    for rows in _blocks(states, block):
        base_made, made = base_logits(base_states[rows]), logits(states[rows])
        twin_made = None if twin is None else twin[0](twin[1][rows])
        for part in _sweeps(made):
            here = _within(rows, part)
            if twin_made is not None:
                near[here] = _near_kl(twin_made[part], made[part])
            _fill_distance(found, here, _log_softmax(base_made[part]), _log_softmax(made[part]), targets[here])
    return found


def mean_kl(
    base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor, block: int | None = None
) -> float:
    """The mean KL(base || other) in nats over n positions, and nothing else; `block` positions at a time."""
    total = 0.0
    for rows in _blocks(states, block or _block_of(logits, states)):
        log_p, log_q = _log_softmax(base_logits(base_states[rows])), _log_softmax(logits(states[rows]))
        total += float(log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(dtype=torch.float64))
    return total / len(states)


def near_kl(base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor) -> Tensor:
    """KL(base || other) in nats of n positions, fp64, for two that hardly differ: one model on two kernels.

    With d the other's logits minus the base's and m their mean under the base's p, KL = log(sum p exp(d - m)): no two
    large numbers are subtracted, so what is far below the rounding of a log-softmax is still right.
    """
    (found,) = _empty(len(states), 1)
    for rows in _blocks(states, _block_of(logits, states)):
        found[rows] = _near_kl(base_logits(base_states[rows]), logits(states[rows]))
    return found


def _near_kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    base = base_logits.double()
    difference = logits.to(base.device, torch.float64).sub(base)
    p = torch.softmax(base, dim=-1)
    difference.sub_((p * difference).sum(-1, keepdim=True))
    return torch.log1p(p.mul_(difference.expm1_()).sum(-1)).cpu()


def _fill_distance(found: Distance, rows: slice, log_p: Tensor, log_q: Tensor, targets: Tensor) -> None:
    """One block of positions; `log_p` and `log_q` are used up."""
    _fill_own(found.own, rows, log_q, targets)
    found.base_log_p[rows] = _target(log_p, targets)
    found.top1_agreement[rows] = (log_p.argmax(-1) == log_q.argmax(-1)).cpu()
    difference = log_p - log_q
    found.reverse_kl_nats[rows] = -_sum(log_q.exp_().mul_(difference))
    weighted = log_p.exp_().mul_(difference)
    found.kl_nats[rows] = _sum(weighted)
    found.kl_abs_modelopt[rows] = _sum(weighted.abs_())


def _fill_own(own: Own, rows: slice, log_p: Tensor, targets: Tensor) -> None:
    own.log_p[rows] = _target(log_p, targets)
    own.entropy_nats[rows] = -_sum(log_p.exp().mul_(log_p))


def _empty(count: int, columns: int) -> list[Tensor]:
    """Columns on the CPU, there before the first block: a result kept between large blocks would pin the heap."""
    return [torch.empty(count, dtype=torch.float64) for _ in range(columns)]


def _target(log_p: Tensor, targets: Tensor) -> Tensor:
    wanted = targets.to(log_p.device)
    found = log_p.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1).double()
    return found.masked_fill(wanted < 0, torch.nan).cpu()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64).cpu()


def _blocks(states: Tensor, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, len(states), block))


def _sweeps(logits: Tensor) -> Iterator[slice]:
    """The rows of a block that are swept at a time."""
    step = len(logits) if logits.device.type == "cuda" else max(1, _SWEEP_NUMBERS // logits.shape[-1])
    return (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step))


def _within(rows: slice, part: slice) -> slice:
    """A part of a block as a slice of all positions."""
    return slice(rows.start + part.start, rows.start + part.stop)


def _block_of(logits: Logits, states: Tensor) -> int:
    return block_rows(logits(states[:1]).shape[-1])
