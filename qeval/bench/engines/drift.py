"""Compare an engine's tokens with those of the variant that it claims to run.

The engine chooses tokens freely, and the reference (the same variant, fake-quantized, in fp32) says of each what it
would have chosen after the same text. Two passes of the reference a prompt tell all of it, however many tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from qeval.backends.base import Session
from qeval.bench.engines.base import FreeRun
from qeval.errors import QevalError
from qeval.store.timings import LEAST_EQUAL, Drift
from qeval.types import Request

LogitsArray = NDArray[np.float32]

MOST_KL_NATS, MOST_MARGIN_NATS = 0.5, 2.0
"""At a divergence: beyond either, no rounding explains it. Activations in int8 stay below a tenth of both."""

FreeRunner = Callable[[Sequence[int], int], FreeRun]
"""A prompt and a count of tokens to an engine's free run."""


def drift(
    run: FreeRunner,
    session: Session,
    prompt: Sequence[int],
    count: int,
    *,
    rejoin: int,
    engine: str,
    variant: str,
    index: int,
) -> Drift:
    """Return how `run` continues a prompt, compared with the reference `session`.

    Raises:
        QevalError: the sequence is longer than either takes, or the engine's logits or tokens are none.
    """
    free = run(prompt, count)
    if not np.isfinite(free.logits).all():
        raise QevalError(f"{engine} gives logits that are not finite for {variant}.")
    if not 0 <= min(free.tokens) <= max(free.tokens) < session.vocab_size:
        raise QevalError(f"{engine} chooses tokens outside the vocabulary of {session.vocab_size} for {variant}.")
    reference = reference_logits(session, prompt, free.tokens)
    wanted = reference.argmax(axis=1)
    equal = wanted == np.asarray(free.tokens)
    agreed = Drift(engine, variant, index, count, float(equal.mean()), None, None, None, None, rejoin)
    if equal.all():
        return agreed
    first = int(np.flatnonzero(~equal)[0])
    expected, actual = log_softmax_fp64(reference[first]), log_softmax_fp64(free.logits[first])
    forced = [*prompt, *free.tokens[:first], int(wanted[first])]
    return replace(
        agreed,
        first_divergence=first,
        kl_nats=_kl(expected, actual),
        margin_nats=float(expected[wanted[first]] - expected[free.tokens[first]]),
        rejoined=_agrees(run, session, forced, rejoin),
    )


def broken(drifts: Sequence[Drift]) -> str | None:
    """Return why an engine's tokens can't be the variant's, in a sentence, or None where rounding explains them all."""
    equal = sum(each.equal_share * each.tokens for each in drifts) / max(sum(each.tokens for each in drifts), 1)
    if drifts and equal < LEAST_EQUAL:
        return f"Only {equal:.0%} of its tokens are those of the variant's own reference logits."
    for each in drifts:
        if each.kl_nats is None or each.margin_nats is None:
            continue
        if each.kl_nats > MOST_KL_NATS or each.margin_nats > MOST_MARGIN_NATS:
            return (
                f"Its tokens leave those of the variant's own reference at token {each.first_divergence} of prompt "
                f"{each.prompt_index}, where no rounding explains it (KL {each.kl_nats:.2g} nats, the reference's "
                f"choice likelier by {each.margin_nats:.2g} nats)."
            )
    return None


def reference_logits(session: Session, prompt: Sequence[int], tokens: Sequence[int]) -> LogitsArray:
    """Return the logits [tokens, vocab] before each of `tokens`, by one pass over the prompt and all of them."""
    ids = (*prompt, *tokens)
    positions = tuple(range(len(prompt) - 1, len(ids) - 1))
    with torch.inference_mode():
        logits: LogitsArray = session.logits(session.states([Request(ids, positions)])[0]).float().cpu().numpy()
    return logits


def log_softmax_fp64(logits: LogitsArray) -> NDArray[np.float64]:
    """Return the log-probabilities [vocab] of one row of logits, in fp64."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    shifted: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return shifted


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return KL(p || q) in nats of two rows of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum())


def _agrees(run: FreeRunner, session: Session, text: Sequence[int], count: int) -> bool:
    """Return whether the engine chooses the reference's tokens after `text`."""
    free = run(text, count)
    return bool((reference_logits(session, text, free.tokens).argmax(axis=1) == np.asarray(free.tokens)).all())
