"""Whether an engine's tokens are those of the variant that it claims to run.

The engine chooses tokens freely, and the reference (the same variant, fake-quantized, in fp32) says of each what it
would have chosen after the same text. Two passes of the reference a prompt tell all of it, however many tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from qeval.backends.base import Session
from qeval.engines.base import FreeRun
from qeval.errors import QevalError
from qeval.store.timings import LEAST_EQUAL, Drift
from qeval.types import Request

Logits = NDArray[np.float32]

MOST_KL_NATS, MOST_MARGIN_NATS = 0.5, 2.0
"""At a divergence: beyond either, no rounding explains it. Activations in int8 stay below a tenth of both."""

Run = Callable[[Sequence[int], int], FreeRun]
"""A prompt and a count of tokens to an engine's free run."""


def drift(
    run: Run, session: Session, prompt: Sequence[int], count: int, *, rejoin: int, engine: str, variant: str, index: int
) -> Drift:
    """What `run` makes of a prompt against the reference `session`.

    Raises:
        QevalError: the sequence is longer than either takes, or the engine's logits or tokens are none.
    """
    made = run(prompt, count)
    if not np.isfinite(made.logits).all():
        raise QevalError(f"{engine} gives logits that are not finite for {variant}.")
    if not 0 <= min(made.tokens) <= max(made.tokens) < session.vocab_size:
        raise QevalError(f"{engine} chooses tokens outside the vocabulary of {session.vocab_size} for {variant}.")
    reference = reference_logits(session, prompt, made.tokens)
    wanted = reference.argmax(axis=1)
    equal = wanted == np.asarray(made.tokens)
    agreed = Drift(engine, variant, index, count, float(equal.mean()), None, None, None, None, rejoin)
    if equal.all():
        return agreed
    first = int(np.flatnonzero(~equal)[0])
    ours, theirs = log_softmax(reference[first]), log_softmax(made.logits[first])
    forced = [*prompt, *made.tokens[:first], int(wanted[first])]
    return replace(
        agreed,
        first_divergence=first,
        kl_nats=_kl(ours, theirs),
        margin_nats=float(ours[wanted[first]] - ours[made.tokens[first]]),
        rejoined=_agrees(run, session, forced, rejoin),
    )


def broken(drifts: Sequence[Drift]) -> str | None:
    """Why an engine's tokens can't be the variant's, in one sentence, or None where rounding explains them all."""
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


def reference_logits(session: Session, prompt: Sequence[int], tokens: Sequence[int]) -> Logits:
    """The logits [tokens, vocab] before each of `tokens`, by one pass over the prompt and all of them."""
    ids = (*prompt, *tokens)
    positions = tuple(range(len(prompt) - 1, len(ids) - 1))
    with torch.inference_mode():
        found: Logits = session.logits(session.states([Request(ids, positions)])[0]).float().cpu().numpy()
    return found


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log-probabilities [vocab] of one row of logits, in fp64."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    shifted: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return shifted


def _kl(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """KL(ours || theirs) in nats of two rows of log-probabilities."""
    return float((np.exp(ours) * (ours - theirs)).sum())


def _agrees(run: Run, session: Session, text: Sequence[int], count: int) -> bool:
    """Whether the engine chooses the reference's tokens after `text`."""
    made = run(text, count)
    return bool((reference_logits(session, text, made.tokens).argmax(axis=1) == np.asarray(made.tokens)).all())
