"""The Protocol of engines: a model that runs prompts and then one token after another, keys and values kept.

An engine is opened for one variant in a process of its own (so that its memory is that variant's and its crash no one
else's), and is asked by one caller. Times are the caller's to take: every method returns only when its work is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qeval.errors import QevalError, UsageError

Tokens = NDArray[np.int64]
"""Token ids: of prompts [batch, prompt], or the next one of each sequence [batch]."""


@dataclass(frozen=True)
class Identity:
    """The engine's name, the provider or device that its nodes got, type, threads and version.

    `dtype` is that of the arithmetic between the quantized products (`fp32`); `weights` says how those are held
    (`int4 MatMulNBits, accuracy level 4`; `fp32, fake-quantized`), since a speed belongs to that and not to the name.
    """

    engine: str
    provider: str
    dtype: str
    weights: str
    threads: int
    version: str


@dataclass(frozen=True)
class Memory:
    """Bytes: of the weights on disk, held by weights, held by keys and values now, and of a GPU's memory in use.

    None where the engine can't tell; what the process as a whole holds (peak RSS) is its parent's to measure.
    """

    disk_bytes: int | None
    weights_bytes: int | None
    cache_bytes: int | None
    device_bytes: int | None


class Engine(Protocol):
    """One open model. `reset`, then `prefill` once, then any number of `step`."""

    @property
    def identity(self) -> Identity:
        """Return what runs, as the runtime itself says it; another provider than the one named raised on opening."""
        ...

    @property
    def max_length(self) -> int:
        """Return the longest sequence, prompt and generated tokens together."""
        ...

    @property
    def compile_seconds(self) -> float:
        """Return the seconds of compiling so far; no part of a latency, as a warm-up comes before."""
        ...

    def reset(self, batch: int, capacity: int) -> None:
        """Drop all sequences and make room for `batch` of them with up to `capacity` tokens each.

        Raises:
            UsageError: this engine can't do such a batch, or a sequence that long.
            MemoryError: there is no room for the keys and values.
        """
        ...

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt], all of one length; the most likely next token of each [batch]."""
        ...

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch] and run it; return the most likely next token of each [batch].

        The tokens need not be those that the engine proposed.

        Raises:
            QevalError: the sequences would be longer than the capacity of `reset`.
        """
        ...

    def logits(self) -> NDArray[np.float32]:
        """Return the logits [batch, vocab] that the last `prefill` or `step` chose by."""
        ...

    def memory(self) -> Memory:
        """Return what is in memory now."""
        ...

    def close(self) -> None:
        """Let everything go."""
        ...


def check_room(name: str, batch: int, capacity: int, *, max_length: int, largest_batch: int | None = None) -> None:
    """Refuse a batch or a sequence that the engine `name` can't do; `largest_batch` None: any.

    Raises:
        UsageError: it says what the engine can do.
    """
    if largest_batch is not None and batch > largest_batch:
        raise UsageError(f"{name} can't run a batch of {batch}; its largest is {largest_batch}.")
    if capacity > max_length:
        raise UsageError(f"{capacity} tokens, prompt and generated together, don't fit the context of {max_length}.")


def check_tokens(name: str, tokens: Tokens, length: int, capacity: int, vocabulary: int) -> None:
    """Refuse tokens [any shape] that would make sequences longer than `capacity`, or that no row of the model knows.

    Raises:
        QevalError: it says which.
    """
    if length > capacity:
        raise QevalError(f"{name}: {length} tokens are more than the {capacity} that room was made for.")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary):
        raise QevalError(f"{name}: a token lies outside the vocabulary of {vocabulary}.")


def greedy(engine: Engine, prompts: Tokens, count: int) -> list[list[int]]:
    """Return the `count` tokens that each of the prompts [batch, prompt] goes on with, by the engine's own choice."""
    engine.reset(len(prompts), prompts.shape[1] + count)
    chosen = [engine.prefill(prompts)]
    while len(chosen) < count:
        chosen.append(engine.step(chosen[-1]))
    return _by_sequence(chosen)


def _by_sequence(chosen: Sequence[Tokens]) -> list[list[int]]:
    return [[int(tokens[row]) for tokens in chosen] for row in range(len(chosen[0]))]


@dataclass(frozen=True)
class FreeRun:
    """The tokens [count] that an engine chose, and the logits [count, vocab] that it chose them by."""

    tokens: tuple[int, ...]
    logits: NDArray[np.float32]


def free_run(engine: Engine, prompt: Sequence[int], count: int) -> FreeRun:
    """Return the engine's own choice of `count` tokens after one prompt."""
    ids = np.asarray([prompt], np.int64)
    engine.reset(1, len(prompt) + count)
    chosen, rows = [engine.prefill(ids)], [engine.logits()[0].copy()]
    while len(chosen) < count:
        chosen.append(engine.step(chosen[-1]))
        rows.append(engine.logits()[0].copy())
    return FreeRun(tuple(int(token[0]) for token in chosen), np.stack(rows))
