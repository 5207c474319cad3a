"""Forward passes of transformers models: the keyword of keys and values, and passes over calibration text.

transformers 5.24 calls the argument `cache`; releases before it, and a checkpoint's own code, `past_key_values`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

_NAMES = ("cache", "past_key_values")


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
    arguments = cache_arguments(model.base_model.forward)
    for sample in samples:
        ids = torch.tensor([sample], dtype=torch.long, device=model.device)
        model.base_model(input_ids=ids, **arguments(make_cache()))
        advance(len(sample))


def returned_cache(output: Any) -> Any:
    """Return the keys and values that a model's `output` holds, or None where it holds none."""
    return next((getattr(output, name) for name in _NAMES if getattr(output, name, None) is not None), None)


def _takes_any(forward: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
