"""Proof that a streamed model's layers give the same when a prefix is shared: on a layer of each kind, not on all.

Where layers are given more than the states of the one before, only a pass through all of them shows it.
"""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from qeval.backends.prefix import cache_of_layer, continued_layer, empty_cache, longer_layer
from qeval.backends.shared import shared_attention
from qeval.backends.sharing import WHOLE, Sharing, differs, promised, settled
from qeval.backends.stream.layer_runner import Relay
from qeval.backends.stream.session import StreamSession
from qeval.backends.stream.weights import LayerWeights
from qeval.models.structure.trace import decoder_layers, text_config
from qeval.types import Request

_TOKENS, _PREFIX, _ROWS = 15, 9, 2
_ONE_LAYER = 4e-5
"""The distance that what one layer adds to its states may have in fp32: rounding gives 5e-6 at most in the tiny
families, and a mask that changes with what is shared (Doge's) 9e-5."""


def proven(model: Any, relay: Relay, weights: LayerWeights, open_with: Callable[[Sharing], StreamSession]) -> Sharing:
    """Return what a weightless model's layers can share.

    A layer of each kind is read and given random states; all layers, twice, where they are given more than states.

    Args:
        model: The weightless model.
        relay: Runs one of its layers.
        weights: Its layers' weights; they are closed at the end.
        open_with: Opens a session of the model that shares as it is told to.
    """
    if type(empty_cache(model)) is not DynamicCache:
        return WHOLE  # a cache of its own (MiniMax's) can't be held for one layer
    if not relay.hands_on_plain_states:
        return _proven_by_passes(model, open_with)
    return _proven_by_layers(model, relay, weights)


def _proven_by_passes(model: Any, open_with: Callable[[Sharing], StreamSession]) -> Sharing:
    vocabulary, dtype = model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.dtype
    drawn = torch.randint(vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    prefix, rests = tuple(drawn[0][:_PREFIX]), [tuple(row[_PREFIX:]) for row in drawn]
    requests = [Request(rest, tuple(range(len(rest)))) for rest in rests]
    with closing(open_with(WHOLE)) as session:
        expected = session.states([request.after(prefix) for request in requests])

    def check(way: Sharing) -> str | None:
        with closing(open_with(way)) as session:
            return differs(session.states(requests, session.prefill(prefix)), expected, dtype)

    return settled(type(model).__name__, [Sharing()], check)


@torch.inference_mode()
def _proven_by_layers(model: Any, relay: Relay, weights: LayerWeights) -> Sharing:
    ways = [Sharing(apart=True)] if promised(model, weights.device)[0].apart else []
    first = _first_of_each_kind(model)
    try:
        return settled(
            type(model).__name__,
            [*ways, Sharing()],
            lambda way: next(filter(None, (_wrong(model, relay, weights, index, way) for index in first)), None),
        )
    finally:
        weights.close()


def _first_of_each_kind(model: Any) -> list[int]:
    """Return the first layer of each kind: by the configuration, by its class, and by what it keeps of a prefix."""
    layers = decoder_layers(model).values()
    named = getattr(text_config(model), "layer_types", None) or [None] * len(layers)
    kept = empty_cache(model).layers or [None] * len(layers)
    kinds = [(name, type(layer), type(each)) for name, layer, each in zip(named, layers, kept, strict=False)]
    return sorted({kinds.index(kind) for kind in kinds})


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
        (whole,) = relay.run(index, (hidden,), None, ids, final=False)
        layer = longer_layer(empty_cache(model).layers[index], None, apart=way.apart)
        cache = cache_of_layer(empty_cache(model).layers, layer, 0)
        relay.run(index, (hidden[:1, :_PREFIX],), cache, ids[:1, :_PREFIX])
        cache = cache_of_layer(empty_cache(model).layers, continued_layer(layer, _ROWS), _PREFIX)
        found = _continued(model, relay, index, way, hidden[:, _PREFIX:], cache, ids[:, _PREFIX:])
    finally:
        weights.remove(index)
    # what the layer adds to its states is compared: it may be small beside them, and is what every layer adds up to
    rest = hidden[:, _PREFIX:]
    allowed = _ONE_LAYER if dtype == torch.float32 else None
    return differs([*(found - rest)], [*(whole[:, _PREFIX:] - rest)], dtype, allowed=allowed)


def _continued(model: Any, relay: Relay, index: int, way: Sharing, hidden: Tensor, cache: Any, ids: Tensor) -> Tensor:
    if not way.apart:
        return relay.run(index, (hidden,), cache, ids, final=False)[0]
    with shared_attention(model):
        return relay.run(index, (hidden,), cache, ids, final=False)[0]
