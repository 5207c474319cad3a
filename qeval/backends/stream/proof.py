"""Proof that a streamed model's layers give the same when a prefix is shared: on a layer of each kind, not on all."""

from typing import Any

import torch
from torch import Tensor

from qeval.backends.prefix import PrefixLayer, cache_of
from qeval.backends.shared import shared_attention
from qeval.backends.sharing import Sharing, differs, promised, settled
from qeval.backends.stream.layer_runner import Relay
from qeval.backends.stream.weights import LayerWeights
from qeval.models.structure.trace import text_config

_TOKENS, _PREFIX, _ROWS = 15, 9, 2


@torch.inference_mode()
def proven(model: Any, relay: Relay, weights: LayerWeights) -> Sharing:
    """Return what a weightless model's layers can share; a layer of each kind is read and given random states.

    Args:
        model: The weightless model.
        relay: Runs one of its layers.
        weights: Its layers' weights; they are closed at the end.
    """
    ways = [Sharing(apart=True)] if promised(model, weights.device)[0].apart else []
    kinds = getattr(text_config(model), "layer_types", None) or ["full_attention"]
    first = sorted({kinds.index(kind) for kind in kinds})
    try:
        return settled(
            type(model).__name__,
            [*ways, Sharing()],
            lambda way: next(filter(None, (_wrong(model, relay, weights, index, way) for index in first)), None),
        )
    finally:
        weights.close()


def _wrong(model: Any, relay: Relay, weights: LayerWeights, index: int, way: Sharing) -> str | None:
    """Return what is wrong with a way to share at one layer; None if nothing is."""
    generator = torch.Generator().manual_seed(index)
    dtype = model.get_output_embeddings().weight.dtype
    width = int(text_config(model).hidden_size)
    hidden = torch.randn(_ROWS, _TOKENS, width, generator=generator).to(weights.device)
    hidden[:, :_PREFIX] = hidden[0, :_PREFIX]
    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.long, device=weights.device)
    weights.install(index, None)
    try:
        whole = relay.run(index, hidden, None, ids)[:, _PREFIX:]
        layer = PrefixLayer(None, apart=way.apart)
        cache = cache_of([layer] * weights.count)
        relay.run(index, hidden[:1, :_PREFIX], cache, ids[:1, :_PREFIX])
        found = _continued(model, relay, index, way, hidden[:, _PREFIX:], cache, ids[:, _PREFIX:])
    finally:
        weights.remove(index)
    return differs([*found], [*whole], dtype)


def _continued(model: Any, relay: Relay, index: int, way: Sharing, hidden: Tensor, cache: Any, ids: Tensor) -> Tensor:
    if not way.apart:
        return relay.run(index, hidden, cache, ids)
    with shared_attention(model):
        return relay.run(index, hidden, cache, ids)
