"""The share of the baseline's k likeliest tokens that are among the variant's; pure.

That is exllamav3's 'top-k agreement' (`eval/model_diff.py`) counted by tokens, whatever their order; its own counts the
positions at which all of the first k are the same, in order. With k = 1 it is llama.cpp's 'Same top p'.

Each row of logits is read once: a maximum of every 64 neighbours is taken, and the k largest lie in the k strips whose
maxima are largest. On top of the sweep's 16 bytes a logit of the pair that is 8.
"""

import torch
from torch import Tensor

TOP_K = (5, 10)
"""The numbers of likeliest tokens that are compared."""
_STRIP = 64
"""Neighbouring logits that have one maximum."""


def topk_agreement(base: Tensor, other: Tensor) -> Tensor:
    """Return the share of the base's top k that are in the other's top k, [len(TOP_K), n] fp64, on their device.

    Of tokens that are equally likely the first counts as likelier. Where the vocabulary has fewer than k tokens, k is
    all of them. Of MPS, which has no fp64, the result lies on the CPU.

    Args:
        base: The base's logits [n, vocabulary] fp32.
        other: The other model's, on the same device.
    """
    base_top, other_top = (top_tokens(logits, max(TOP_K)) for logits in (base, other))
    shares = []
    for k in TOP_K:
        ours, theirs = base_top[:, :k], other_top[:, :k]
        in_both = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)
        shares.append(in_both.double().mean(-1))
    return torch.stack(shares)


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the k likeliest tokens [n, k], the likeliest first, of equals the first; all, if they're fewer.

    >>> top_tokens(torch.tensor([[0.5, 2.0, 2.0, 1.0]]), 3)
    tensor([[1, 2, 3]])
    """
    rows, vocabulary = logits.shape
    strips = vocabulary // _STRIP
    inside = strips * _STRIP
    rest = torch.arange(inside, vocabulary, device=logits.device).expand(rows, -1)
    if strips > k:
        # only strips with one of the k largest maxima hold any of the k largest logits
        largest = logits[:, :inside].view(rows, strips, _STRIP).amax(-1)
        chosen = _first_largest(largest, k).to(logits.device)
        tokens = (chosen.unsqueeze(-1) * _STRIP + torch.arange(_STRIP, device=logits.device)).flatten(1)
        tokens = torch.cat([tokens.sort(-1).values, rest], dim=-1)
    else:
        tokens = torch.arange(vocabulary, device=logits.device).expand(rows, -1)
    places = _first_largest(logits.gather(-1, tokens), min(k, vocabulary))
    return tokens.to(places.device).gather(-1, places)


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Return the places [n, k] of the largest values of each row, the largest first, of equals the first.

    torch.topk names any of equals; so it is given integers in the order of the values (fp32) that are all different.
    """
    values = values.cpu() if values.device.type == "mps" else values
    bits = (values.float() + 0.0).view(torch.int32).long()  # adding zero makes -0 the same as 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # a negative number's bits grow with its size
    place = torch.arange(values.shape[-1], device=values.device)
    return torch.topk(ordered * (1 << 32) - place, k, dim=-1).indices
