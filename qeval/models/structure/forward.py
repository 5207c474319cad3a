"""Forward passes of transformers models up to their heads, with and without a cache, and over calibration text.

The *final states* of a model are what its head's matrix multiplies. In most families they are what the body (`.model`)
returns; where something stands between the two (BERT's transform, Inkling's scale), they are caught at the head.

transformers 5.24 calls the argument `cache`; releases before it, and a checkpoint's own code, `past_key_values`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

_NAMES = ("cache", "past_key_values")
_FEW_TOKENS = 4

_ENDS_IN_BODY: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
"""By model object, true where its final states are those that its body returns; tried once."""


def _cache_name(forward: Callable[..., Any]) -> str | None:
    """Return what `forward` calls the argument of keys and values, or None where it takes none.

    A forward pass that takes any keyword hands them on to transformers' own code, so it's the installed release's name.
    """
    parameters = inspect.signature(forward).parameters
    named = [name for name in _NAMES if name in parameters]
    if named or not _takes_any(forward):
        return next(iter(named), None)
    return next(name for name in _NAMES if name in inspect.signature(create_causal_mask).parameters)


def cache_arguments(forward: Callable[..., Any]) -> Callable[[Any], dict[str, Any]]:
    """Return what makes the keyword arguments for a forward pass that reads and fills a cache, or for one without.

    The result takes a transformers cache, or None for a pass that keeps nothing.
    """
    name = _cache_name(forward)
    takes_use = "use_cache" in inspect.signature(forward).parameters or _takes_any(forward)

    def arguments(cache: Any) -> dict[str, Any]:
        keywords = {} if name is None else {name: cache}
        return keywords | ({"use_cache": cache is not None} if takes_use else {})

    return arguments


def body_of(model: Any) -> Any:
    """Return the module that ends in the last norm: a model's base model, or its `model` where it names no other."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model  # as Llama 4's does


class FinalStates:
    """Runs a causal language model up to its head."""

    def __init__(self, model: Any) -> None:
        """Find out where the model's final states come from, unless that is known.

        Args:
            model: In eval mode, with its weights in memory.
        """
        self._model, self._body = model, body_of(model)
        if model not in _ENDS_IN_BODY:
            head = model.get_output_embeddings().weight
            whole_pass(model, torch.arange(1, _FEW_TOKENS + 1, device=head.device).unsqueeze(0) % len(head))
        self.ends_in_body = _ENDS_IN_BODY[model]
        runs = self._body if self.ends_in_body else model
        self.parameters = inspect.signature(runs.forward).parameters
        self._cache_arguments = cache_arguments(runs.forward)

    def __call__(self, ids: Tensor | None, cache: Any = None, **places: Tensor) -> Tensor:
        """Return the final states [batch, tokens, d_model] of token ids [batch, tokens].

        Args:
            ids: The tokens; None where `places` hold their embeddings.
            cache: What the pass continues and fills; by default nothing is kept.
            places: More arguments of the forward pass.
        """
        arguments = {"input_ids": ids, **self._cache_arguments(cache), **places}
        if not self.ends_in_body:
            return _caught_at_head(self._model, arguments)
        states: Tensor = self._body(**arguments).last_hidden_state
        return states


@torch.inference_mode()
def whole_pass(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's own logits [tokens, vocab] and final states [tokens, d_model] of token ids [1, tokens].

    Whether the final states are those that the body returns is noted for `FinalStates`.
    """
    returned: list[Any] = []
    caught: list[Tensor] = []
    body = body_of(model)
    handles = [
        body.register_forward_hook(lambda _module, _inputs, output: returned.append(output)),
        model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0])),
    ]
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()

    if caught and not returned:  # OPT's forward pass calls the decoder inside of its body
        returned.append(body(input_ids=ids, use_cache=False))
    last = getattr(returned[-1], "last_hidden_state", None) if returned else None
    # a head that no hook sees may still multiply the body's states: `head_of` compares the logits
    _ENDS_IN_BODY[model] = not caught or (isinstance(last, Tensor) and torch.equal(last, caught[-1]))
    states: Any = last if _ENDS_IN_BODY[model] else _next_token_stream(caught[-1])
    return logits[0], states[0]


class _HeadReached(Exception):  # noqa: N818 - it ends a pass, and is no error
    """The head was handed `states`: what comes after is not wanted."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _caught_at_head(model: Any, arguments: dict[str, Any]) -> Tensor:
    """Return what a whole model's pass hands its head; the head itself is not run."""

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _HeadReached(inputs[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        model(**arguments)
    except _HeadReached as reached:
        return _next_token_stream(reached.states)
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} did not run its head")


def _next_token_stream(states: Tensor) -> Tensor:
    """Return the states [batch, tokens, d_model] that predict the next token, where others predict those after it."""
    return states[:, 0] if states.dim() == 4 else states  # ProphetNet: [batch, tokens ahead, tokens, d_model]


def run_samples(
    model: Any,
    samples: Sequence[Sequence[int]],
    advance: Callable[[int], object],
    make_cache: Callable[[], Any] = lambda: None,
) -> None:
    """Run calibration text through a model's decoder, for whatever listens to its layers.

    Args:
        model: A transformers causal language model.
        samples: Token ids, one sequence a forward pass.
        advance: Called with the tokens of each pass.
        make_cache: Makes the cache of a pass; by default none, so that nothing is kept.
    """
    states = FinalStates(model)
    for sample in samples:
        states(torch.tensor([sample], dtype=torch.long, device=model.device), make_cache())
        advance(len(sample))


def returned_cache(output: Any) -> Any:
    """Return the keys and values that a model's `output` holds, or None where it holds none."""
    return next((getattr(output, name) for name in _NAMES if getattr(output, name, None) is not None), None)


def _takes_any(forward: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
