"""Passes over long sequences in parts, where attention would hold a number for each pair of positions.

Plain causal attention by SDPA makes no mask for a whole sequence. A sliding window has one of window x window, what
continues a prefix one of its tokens x all before them, and attention that is written out (`eager`) holds the scores of
every head. At 32,768 tokens those are 1 GiB and more a copy; so such a sequence is run in parts that each continue the
keys and values of the parts before.
"""

from typing import Any

import torch

from qeval.models.structure.trace import text_config

_BYTES, _GPU_BYTES = 1 << 29, 1 << 31
"""The bytes that the pairs of one pass may take, all copies counted."""
_MASK_BYTES = 8
"""Of a pair: three masks of a byte while they are joined, or the one that is added to scores in fp32 and its source."""
_SCORE_COPIES = 4
"""Scores, scaled, masked, and their softmax, in fp32, of each head."""
_LEAST_PART = 64
"""Tokens of a part at least: shorter ones read the keys and values before them too often."""


def part_tokens(model: Any, total: int, device: torch.device, *, continues: bool) -> int | None:
    """Return how many tokens a pass may hold of a sequence, or None where nothing is held for pairs of positions.

    Args:
        model: A transformers causal language model.
        total: The tokens of the whole sequence.
        device: Where it computes.
        continues: Whether the pass goes on from keys and values.
    """
    config = text_config(model)
    kind = config._attn_implementation
    if kind not in ("sdpa", "eager"):
        return None
    windows = getattr(config, "sliding_window", None) is not None
    kinds = set(getattr(config, "layer_types", None) or ())
    if kind == "sdpa" and not (continues or windows or kinds - {"full_attention"}):
        return None
    heads = (getattr(config, "num_attention_heads", None) or 1) if kind == "eager" else 0
    of_pair = _MASK_BYTES + 4 * _SCORE_COPIES * heads
    most = (_BYTES if device.type == "cpu" else _GPU_BYTES) // (of_pair * total)
    return None if most >= total else max(_LEAST_PART, most)
