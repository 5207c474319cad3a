"""Distances of a variant's next-token distributions from the baseline's, one number a position.

Everything comes from one sweep over a block of logits (`metrics/sweep.py`): log-softmax in fp32, sums in fp64. Nothing
is clipped: a KL-divergence that rounding leaves a hair below zero stays so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.arithmetic import with_fp64
from qeval.metrics.sampling import SAMPLING_COLUMNS, compare_sampling
from qeval.metrics.sweep import COLUMNS, Swept, kl_of_rows, numbers, sweep_logits
from qeval.metrics.topk import TOP_K, topk_agreement
from qeval.types import Sampler

Logits = Callable[[Tensor], Tensor]

_BLOCK_NUMBERS, _GPU_BLOCK_NUMBERS = 1 << 23, 1 << 26
"""Logits of one model in memory at a time (32 MiB), so that peak memory does not grow with window or vocabulary.

Fewer make matrix products of few rows, which are slow: at 2^22 a head of 49,152 x 576 ran at 43 GFLOP/s on a core that
reached 58 at 2^23 and 61 at 2^24."""
_SWEEP_NUMBERS = 1 << 20
"""Logits that are swept at a time on the CPU: what lies in its caches is swept up to three times as fast."""


def block_rows(vocabulary: int, device: torch.device | None = None) -> int:
    """Return how many positions' logits, each as wide as the vocabulary, are made at a time."""
    on_gpu = device is not None and device.type != "cpu"
    return max(1, (_GPU_BLOCK_NUMBERS if on_gpu else _BLOCK_NUMBERS) // vocabulary)


@dataclass(frozen=True, eq=False)
class ModelNumbers:
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
    overlap: Tensor
    topk_agreement: dict[int, Tensor]
    """The share of the base's k likeliest tokens that are among the variant's, by k."""
    numbers: ModelNumbers
    base_log_p: Tensor
    twin_kl_nats: Tensor | None
    """KL from the same weights on another backend; None without one."""
    sampling_kl_nats: Tensor | None
    outside_nucleus: Tensor | None
    """As `metrics.sampling` defines them; None without a sampler."""


def model_numbers(logits: Logits, states: Tensor, targets: Tensor, block: int) -> ModelNumbers:
    """Return the log-probability of each position's target token, and the distribution's entropy.

    Args:
        logits: The model's head: states [rows, width] to logits [rows, vocabulary].
        states: The final hidden states, [n, width].
        targets: The token id that follows each position, -1 where there is none, [n].
        block: How many positions go through the head at a time.
    """
    columns = _columns(2, len(states))
    for rows in _blocks(states, block):
        block_logits = logits(states[rows])
        columns, targets = _beside(block_logits, columns), targets.to(block_logits.device)
        for part in _sweeps(block_logits):
            here = _within(rows, part)
            columns[:, here] = numbers(block_logits[part], targets[here])
    return ModelNumbers(*columns.cpu())


def distance(
    base_logits: Logits,
    base_states: Tensor,
    logits: Logits,
    states: Tensor,
    targets: Tensor,
    block: int,
    twin: tuple[Logits, Tensor] | None = None,
    sampling: Sampler | None = None,
) -> Distance:
    """Return the distances of a variant's distributions from the baseline's.

    On a GPU the host reads the columns once, when all of them are there.

    Args:
        base_logits: The baseline's head: states [rows, width] to logits [rows, vocabulary].
        base_states: The baseline's final hidden states, [n, width].
        logits: The variant's head.
        states: The variant's final hidden states, [n, width].
        targets: The token id that follows each position, -1 where there is none, [n].
        block: How many positions go through the heads at a time.
        twin: The head and the states [n, width] of the same weights on another backend, compared in the same sweep.
        sampling: The sampler under which the two are compared too.
    """
    width = COLUMNS + len(TOP_K) + (SAMPLING_COLUMNS if sampling else 0)
    columns, near = _columns(width, len(states)), _columns(1, len(states))
    base_states = on_one_device(base_states, states)  # in one copy, where only the variant's are on a GPU
    for rows in _blocks(states, block):
        variant_block = logits(states[rows])
        base_block = on_one_device(base_logits(base_states[rows]), variant_block)
        variant_block = on_one_device(variant_block, base_block)
        twin_block = None if twin is None else on_one_device(twin[0](twin[1][rows]), variant_block)

        # columns and targets lie beside the logits from the first block on
        columns, near = _beside(variant_block, columns), _beside(variant_block, near)
        targets = targets.to(variant_block.device)
        for part in _sweeps(variant_block):
            here = _within(rows, part)
            if twin_block is not None:
                near[0, here] = _near_kl(twin_block[part], variant_block[part])
            columns[:, here] = _compare(base_block[part], variant_block[part], targets[here], sampling)
    swept, more = Swept(*(columns := columns.cpu())[:COLUMNS]), columns[COLUMNS:]
    return Distance(
        swept.kl_nats,
        swept.reverse_kl_nats,
        swept.kl_abs_modelopt,
        swept.top1_agreement.bool(),
        swept.overlap,
        dict(zip(TOP_K, more, strict=False)),
        ModelNumbers(swept.log_p, swept.entropy_nats),
        swept.base_log_p,
        None if twin is None else near[0].cpu(),
        *(more[len(TOP_K) :] if sampling else (None, None)),
    )


def _compare(base: Tensor, other: Tensor, targets: Tensor, sampling: Sampler | None) -> Tensor:
    """Return every number that compares two models' logits, one column a row."""
    parts = [sweep_logits(base, other, targets), topk_agreement(base, other)]
    if sampling:
        parts.append(compare_sampling(base, other, sampling))
    return torch.cat(parts)


def mean_kl(
    base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor, block: int | None = None
) -> float:
    """Return the mean KL(base || other) in nats over n positions.

    Args:
        base_logits: The base's head: states [rows, width] to logits [rows, vocabulary].
        base_states: The base's final hidden states, [n, width].
        logits: The other's head.
        states: The other's final hidden states, [n, width].
        block: How many positions go through the heads at a time; by default as many as fit the memory budget.
    """
    total = 0.0
    for rows in _blocks(states, block or _block_of(logits, states)):
        other = logits(states[rows])
        base = on_one_device(base_logits(base_states[rows]), other)
        total += float(kl_of_rows(base, on_one_device(other, base)).sum())
    return total / len(states)


def near_kl(base_logits: Logits, base_states: Tensor, logits: Logits, states: Tensor) -> Tensor:
    """Return KL(base || other) in nats of n positions, fp64, for two that hardly differ: one model on two kernels.

    With d the other's logits minus the base's and m their mean under the base's p, KL = log(sum p exp(d - m)): no two
    large numbers are subtracted, so what is far below the rounding of a log-softmax is still right.
    """
    kl = _columns(1, len(states))[0]
    for rows in _blocks(states, _block_of(logits, states)):
        kl[rows] = _near_kl(base_logits(base_states[rows]), logits(states[rows])).cpu()
    return kl


def on_one_device(logits: Tensor, others: Tensor) -> Tensor:
    """Return `logits` on the device where both are swept: the accelerator if either is on one."""
    return logits.to(others.device) if others.device.type != "cpu" else logits


def _near_kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    base, other = on_one_device(base_logits, logits), on_one_device(logits, base_logits)
    base = with_fp64(base).double()
    difference = with_fp64(other).double().sub(base)
    p = torch.softmax(base, dim=-1)
    difference.sub_((p * difference).sum(-1, keepdim=True))
    return torch.log1p(p.mul_(difference.expm1_()).sum(-1))


def _columns(count: int, positions: int) -> Tensor:
    """Return columns [count, positions] fp64, made before the first block: made between blocks they pin the heap."""
    return torch.empty(count, positions, dtype=torch.float64)


def _beside(logits: Tensor, columns: Tensor) -> Tensor:
    """Return columns on the logits' device, empty ones where they lay elsewhere; for MPS, without fp64, on the CPU."""
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    return columns if columns.device == device else torch.empty(columns.shape, dtype=columns.dtype, device=device)


def _blocks(states: Tensor, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, len(states), block))


def _sweeps(logits: Tensor) -> Iterator[slice]:
    """Yield the rows of a block that are swept at a time."""
    step = len(logits) if logits.device.type != "cpu" else max(1, _SWEEP_NUMBERS // logits.shape[-1])
    return (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step))


def _within(rows: slice, part: slice) -> slice:
    """Return a part of a block as a slice of all positions."""
    return slice(rows.start + part.start, rows.start + part.stop)


def _block_of(logits: Logits, states: Tensor) -> int:
    return block_rows(logits(states[:1]).shape[-1])
