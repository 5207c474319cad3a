"""Losses that a sampler which cuts the tail and tempers would notice of a variant: KL and escapes after top-p; pure.

With z the logits and T the temperature, p = softmax(z of the base / T) and q = softmax(z of the variant / T). The
nucleus N of p is the smallest set of likeliest tokens that holds at least `top_p` of it (Holtzman et al., arXiv
1904.09751; transformers' TopPLogitsWarper), M that of q. Tokens as likely as the last that is needed are all in.

- `sampling_kl_nats` = KL(p given N || q given N): both cut to the base's nucleus and made to sum to one. It is finite
  wherever the logits are, never below zero, and zero for the base itself. With the whole of q in the place of q given N
  it would be larger by -log q(N), which is not zero for the base itself.
- `outside_nucleus` = q(M without N) / q(M): the share of tokens sampled from the variant that the base's sampler could
  never have said. Zero for the base itself.
"""

import torch
from torch import Tensor

from qeval.arithmetic import row_sums, with_fp64
from qeval.types import Sampler

SAMPLING_COLUMNS = 2
_CANDIDATES = (128, 1024)
"""The numbers of likeliest tokens that are tried before the whole vocabulary is sorted."""


def compare_sampling(base: Tensor, other: Tensor, sampling: Sampler) -> Tensor:
    """Return `sampling_kl_nats` and `outside_nucleus` of each position, [2, n] fp64 (of MPS: on the CPU).

    Args:
        base: The base's logits [n, vocabulary] fp32.
        other: The other model's, on the same device.
        sampling: The sampler.
    """
    log_p, log_q = (
        torch.log_softmax(logits / sampling.temperature, dim=-1, dtype=torch.float32) for logits in (base, other)
    )
    p, q = log_p.exp(), log_q.exp()
    in_base, in_other = nucleus(p, sampling.top_p), nucleus(q, sampling.top_p)

    # with P = p(N), Q = q(N): KL(p/P || q/Q) = sum over N of p/P (log p - log q) + log Q - log P
    base_mass, other_mass = row_sums(p * in_base), row_sums(q * in_base)
    difference = torch.where(in_base, p * (log_p - log_q), 0.0)
    kl = row_sums(difference) / base_mass + other_mass.log() - base_mass.log()
    outside = row_sums(q * (in_other & ~in_base)) / row_sums(q * in_other)
    return torch.stack([kl, outside])


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return which tokens a sampler may draw, [n, vocabulary] bool, of probabilities [n, vocabulary] fp32.

    >>> nucleus(torch.tensor([[0.5, 0.3, 0.2]]), 0.6)
    tensor([[ True,  True, False]])
    """
    if top_p == 1:
        return torch.ones_like(p, dtype=torch.bool)
    for count in _CANDIDATES:
        likeliest = torch.topk(p, min(count, p.shape[-1]), dim=-1).values
        held = with_fp64(likeliest).double().cumsum(-1)
        if bool((held[:, -1] >= top_p).all()):
            break
    else:
        likeliest = torch.sort(p, dim=-1, descending=True).values
        held = with_fp64(likeliest).double().cumsum(-1)
    last = (held < top_p).sum(-1, keepdim=True).clamp_(max=likeliest.shape[-1] - 1).to(p.device)
    return p >= likeliest.gather(-1, last)
