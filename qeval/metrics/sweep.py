"""One sweep over two models' logits: every number that compares their distributions at a position.

`plain_sweep` says what is computed, in torch's own operators. On a CUDA GPU with Triton a kernel computes the same in
two passes over the logits (`metrics/sweep_kernel.py`): 16 bytes read a logit, where the operators move more than 100.
"""

import functools
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.arithmetic import row_sums

_PROOF_ROWS, _PROOF_VOCABULARY = 4, 5000
_PROOF_TOLERANCE = 1e-5


class Swept(NamedTuple):
    """A model against its base at n positions: columns [n] in fp64, in nats, on the device of the logits.

    `top1_agreement` is 1 where the likeliest tokens are the same and 0 elsewhere; `base_log_p` and `log_p` are the
    target token's log-probabilities, NaN where there is no target. `overlap` is the sum of min(p, q), 1 minus the total
    variation distance.
    """

    kl_nats: Tensor
    reverse_kl_nats: Tensor
    kl_abs_modelopt: Tensor
    top1_agreement: Tensor
    base_log_p: Tensor
    log_p: Tensor
    entropy_nats: Tensor
    overlap: Tensor


COLUMNS = len(Swept._fields)


def sweep_logits(base: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Return what `Swept` names of each position, [8, n] fp64, on the logits' device (MPS has no fp64: on the CPU).

    Args:
        base: The base's logits [n, vocabulary] fp32.
        other: The other model's, on the same device.
        targets: The token id that follows each position, -1 where there is none, [n].
    """
    if _runs_kernel(other.device):
        from qeval.metrics.sweep_kernel import kernel_sweep  # noqa: PLC0415 - Triton comes with torch for CUDA alone

        return kernel_sweep(base, other, targets)
    return torch.stack(plain_sweep(base, other, targets))


def plain_sweep(base: Tensor, other: Tensor, targets: Tensor) -> Swept:
    """Compute what `sweep_logits` does by torch's operators: log-softmax in fp32, sums in fp64."""
    log_p, log_q = log_softmax_fp32(base), log_softmax_fp32(other)
    base_target, target = target_log_p(log_p, targets), target_log_p(log_q, targets)
    entropy = entropy_of(log_q)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).to(entropy)

    # from here on log_p and log_q are used up: each holds the next step's terms
    difference = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    terms = q * difference
    reverse = -row_sums(terms)
    overlap = row_sums(torch.minimum(p, q, out=terms)).clamp_(max=1)  # rounding alone goes beyond
    weighted = p.mul_(difference)
    kl = row_sums(weighted)
    return Swept(kl, reverse, row_sums(weighted.abs_()), agreement, base_target, target, entropy, overlap)


def plain_numbers(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the target's log-probability and the entropy of positions, [2, n] fp64; arguments as `sweep_logits`'s."""
    log_p = log_softmax_fp32(logits)
    return torch.stack([target_log_p(log_p, targets), entropy_of(log_p)])


def numbers(logits: Tensor, targets: Tensor) -> Tensor:
    """Return a model's own numbers, [2, n]: as `plain_numbers`, by the kernel where there is one."""
    if _runs_kernel(logits.device):
        return sweep_logits(logits, logits, targets)[5:7]
    return plain_numbers(logits, targets)


def kl_of_rows(base: Tensor, other: Tensor) -> Tensor:
    """Return KL(base || other) of each position, [n] fp64; arguments as `sweep_logits`'s."""
    if _runs_kernel(other.device):
        return sweep_logits(base, other, torch.full((len(base),), -1, device=base.device))[0]
    log_p, log_q = log_softmax_fp32(base), log_softmax_fp32(other)
    return row_sums(log_q.neg_().add_(log_p).mul_(log_p.exp_()))


def sweep_warning(device: torch.device) -> str | None:
    """Return the sentence for a GPU that could run the kernel and doesn't, with the reason."""
    problem = kernel_problem(device) if _may_run_kernel(device) else None
    return problem and f"Divergences are summed by torch's operators, several times slower: {problem}."


@functools.cache
def kernel_problem(device: torch.device) -> str | None:
    """Return why the kernel isn't used on a GPU that could run it, tried on a few rows; None where it is used."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from qeval.metrics.sweep_kernel import kernel_sweep  # noqa: PLC0415

    random = torch.Generator().manual_seed(0)
    base = torch.randn(_PROOF_ROWS, _PROOF_VOCABULARY, generator=random).mul_(4).to(device)
    other = base + torch.randn(base.shape, generator=random).mul_(0.1).to(device)
    targets = torch.tensor([0, -1, 17, _PROOF_VOCABULARY - 1], device=device)
    try:
        swept = kernel_sweep(base, other, targets)
    except Exception as error:  # noqa: BLE001 - compilers fail in any way
        return f"it did not compile ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    wanted = torch.stack(plain_sweep(base, other, targets))
    if not torch.allclose(swept, wanted, rtol=_PROOF_TOLERANCE, atol=_PROOF_TOLERANCE, equal_nan=True):
        return "its numbers differ from torch's"
    return None


def _may_run_kernel(device: torch.device) -> bool:
    """Return whether a device is a GPU that this torch compiles for; one that tests pretend is none."""
    return device.type == "cuda" and (torch.version.cuda is not None or torch.version.hip is not None)


def _runs_kernel(device: torch.device) -> bool:
    return _may_run_kernel(device) and kernel_problem(device) is None


def log_softmax_fp32(logits: Tensor) -> Tensor:
    """Return the log-probabilities of logits [n, vocabulary], fp32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def target_log_p(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability [n] of each row's target, NaN where there is none (-1), in the type of `row_sums`."""
    chosen = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(targets < 0, torch.nan)
    return (chosen.cpu() if chosen.device.type == "mps" else chosen).double()


def entropy_of(log_p: Tensor) -> Tensor:
    """Return the entropy [n] of distributions in log-probabilities [n, vocabulary]."""
    return -row_sums(log_p.exp().mul_(log_p))
