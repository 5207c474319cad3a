"""Proof, at load, that a model gives the same states when sequences share what they have in common.

A prefix's keys and values are kept for all that continues it, and sequences of unequal length may be packed into one
row. Both assume that attention is plainly causal and goes through transformers' interface. A model whose attention
adds to the mask, has an interface of its own or takes no cache gives other scores, or none: a few random tokens show
it. Each way is tried on them against full forward passes in the compute type, the fastest first, and the first that
agrees is taken.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qeval.backends.base import Session
from qeval.backends.prefix import is_lent, prefix_cache
from qeval.backends.shared import can_pack, can_share
from qeval.errors import QevalError, UsageError
from qeval.models.structure.supported import context_length
from qeval.models.structure.trace import text_config
from qeval.types import Request

_TOKENS, _PREFIX = 15, 9
"""Of the longest sequence that is tried, and of the prefix: longer than the windows of the tiny models of 8 tokens."""
_ALLOWED = {torch.float32: 5e-4, torch.float64: 5e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far states may be apart, relative to their length: rounding through many layers in the compute type. Attention to
other tokens is ten times further off in float32; in half precision the middle position counts, not the worst."""
_FAILURES = (QevalError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Sharing:
    """The ways in which sequences of a model may share work.

    `prefixes`: what a prefix leaves in the cache is kept. `apart`: attention to a prefix is computed once for all rows
    (`backends/shared.py`). `packs`: sequences of unequal length may be run in one row. `stepwise`: what continues a
    prefix is run a token at a time. `warning`: what a reader must know where less is shared than the configuration
    promises.
    """

    prefixes: bool = True
    apart: bool = False
    packs: bool = False
    stepwise: bool = False
    warning: str | None = None


WHOLE = Sharing(prefixes=False)
"""Every sequence is run from its first token on."""

_PROVEN: "WeakKeyDictionary[Any, Sharing]" = WeakKeyDictionary()


@torch.inference_mode()
def sharing_of(model: Any, open_with: Callable[[Sharing], Session]) -> Sharing:
    """Return what a model can share, tried once for each model object.

    Args:
        model: A transformers causal language model.
        open_with: Opens a session of it that shares as it is told to.

    Raises:
        UsageError: the model is not causal: what stands behind a token changes its state.
    """
    if model not in _PROVEN:
        _PROVEN[model] = _prove(model, open_with)
    return _PROVEN[model]


def promised(model: Any, device: torch.device) -> list[Sharing]:
    """Return what a model's configuration promises on a device, the fastest way first, then what is left otherwise."""
    apart, packs = can_share(model, device), can_pack(model, device)
    ways = [Sharing(apart=True, packs=True)] if packs else []
    copies = not is_lent(prefix_cache(model))
    last = [Sharing(), Sharing(stepwise=True)] if copies else [Sharing()]
    return [*ways, *([Sharing(apart=True)] if apart else []), *last]


def differs(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, *, allowed: float | None = None
) -> str | None:
    """Return in words by how much states [positions, d_model] differ beyond rounding; None where they don't.

    Args:
        found: The states of each sequence.
        expected: The same from full forward passes.
        dtype: What both were computed in.
        allowed: How far they may be apart, relative to their length; None is what many layers may.
    """
    mine, theirs = torch.cat([*found]).float(), torch.cat([*expected]).float()
    if not mine.isfinite().all():
        return "its states are not finite"
    length = torch.linalg.vector_norm
    far = length(mine - theirs, dim=-1) / length(theirs, dim=-1).clamp(min=1e-30)
    off = float(far.max() if dtype in (torch.float32, torch.float64) else far.median())
    most = _ALLOWED.get(dtype, 5e-4) if allowed is None else allowed
    return None if off <= most else f"its states are {100 * off:.2g} % off"


def settled(name: str, ways: Sequence[Sharing], check: Callable[[Sharing], str | None]) -> Sharing:
    """Return the first way that a check finds nothing wrong with, with a warning where it is not the first.

    Args:
        name: The model's class.
        ways: As `promised` gives them.
        check: Returns what is wrong with a way, or fails as the model does.
    """
    wrong: str | None = None
    for way in ways:
        if (found := _outcome(way, check)) is None:
            return way if wrong is None or way.stepwise else replace(way, warning=_slower(name, wrong, way))
        wrong = wrong or found
    return Sharing(prefixes=False, warning=_slower(name, str(wrong), WHOLE))


def _outcome(way: Sharing, check: Callable[[Sharing], str | None]) -> str | None:
    try:
        return check(way)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        return f"it fails ({type(error).__name__})"


def _slower(name: str, wrong: str, way: Sharing) -> str:
    instead = "their prefix's keys and values are copied for each" if way.prefixes else "each is run whole"
    return (
        f"{name} does not give the same states when sequences share a prefix or a row ({wrong} on a few random "
        f"tokens), so {instead}: the scores are those of full forward passes, and take longer."
    )


def _prove(model: Any, open_with: Callable[[Sharing], Session]) -> Sharing:
    limit = min(_TOKENS, context_length(text_config(model), type(model).__name__))
    if limit < 3:
        return WHOLE
    prefix, rests = _sequences(model, limit)
    dtype = model.get_output_embeddings().weight.dtype
    whole = open_with(WHOLE)
    full = [_request(prefix + rest) for rest in rests]
    states = whole.states(full)
    if not all(bool(state.isfinite().all()) for state in states):
        return WHOLE  # nothing can be told of such a model by comparing; scoring it says that it is broken
    _check_causal(model, whole.states([_request(prefix)])[0], states[0][: len(prefix)], dtype)
    after = [each[len(prefix) :] for each in states]

    def check(way: Sharing) -> str | None:
        session = open_with(way)
        found = session.states([_request(rest) for rest in rests], session.prefill(prefix))
        wrong = differs(found, after, dtype)
        if wrong is None and way.packs:
            wrong = differs(session.states(full), states, dtype)
        return wrong

    return settled(type(model).__name__, promised(model, model.device), check)


def _check_causal(model: Any, alone: Tensor, among: Tensor, dtype: torch.dtype) -> None:
    if wrong := differs([among], [alone], dtype):
        raise UsageError(
            f"{type(model).__name__} is not causal: what stands behind a token changes its state ({wrong}), so it "
            "gives no probability of a text; if it is an encoder, its config.json may need is_decoder."
        )


def _sequences(model: Any, limit: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Random tokens: a prefix, and three continuations of unequal length, `limit` tokens at most in all."""
    length = min(_PREFIX, limit - 2)
    rows = int(model.get_input_embeddings().weight.shape[0])
    drawn: Iterator[int] = iter(torch.randint(rows, (64,), generator=torch.Generator().manual_seed(0)).tolist())
    counts = (limit - length, 1, max(1, (limit - length) // 2))
    return tuple(next(drawn) for _ in range(length)), [tuple(next(drawn) for _ in range(count)) for count in counts]


def _request(tokens: tuple[int, ...]) -> Request:
    return Request(tokens, tuple(range(len(tokens))))
