"""An engine without a model: the formulas of `backends.replay`, one token at a time, for tests and for trying things.

A sequence's keys and values are one running sum, [width] fp64, so it answers exactly as the session of that name does
that is given the whole sequence at once.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qeval import __version__
from qeval.bench.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.bench.engines.engine_spec import EngineSpec

VOCABULARY, CONTEXT, GRAPH_WIDTH = 1 << 16, 4096, 16
_DECAY, _SHARPNESS = 0.9, 3.0
_FLOAT64_BYTES = 8


@dataclass
class _Sequences:
    totals: NDArray[np.float64]
    capacity: int
    length: int = 0


class ReplayEngine:
    """A causal language model of a few formulas."""

    compile_seconds = 0.0
    """Return 0: nothing is compiled."""

    def __init__(self, vocab_size: int = VOCABULARY, max_length: int = CONTEXT, largest_batch: int = 64) -> None:
        """Take the arguments: engines of the same ones answer alike."""
        self.max_length, self._largest_batch = max_length, largest_batch
        index = np.arange(vocab_size * GRAPH_WIDTH, dtype=np.float64).reshape(vocab_size, GRAPH_WIDTH)
        self._embedding = np.sin((index + 1) * 1.7)
        self._head = (np.cos((index + 1) * 2.3) * _SHARPNESS).astype(np.float32)
        self._kept: _Sequences | None = None

    @property
    def identity(self) -> Identity:
        """Return what runs: formulas in fp64."""
        return Identity("replay", "cpu", "fp64", "none", 1, __version__)

    def reset(self, batch: int, capacity: int) -> None:
        """Drop all sequences.

        Raises:
            UsageError: the batch or the sequence is too large.
        """
        check_room("replay", batch, capacity, largest_batch=self._largest_batch, max_length=self.max_length)
        self._kept = _Sequences(np.zeros((batch, GRAPH_WIDTH)), capacity)

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt]."""
        for column in prompts.T:
            self._append(column)
        return self._choice()

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch]."""
        self._append(tokens)
        return self._choice()

    def logits(self) -> NDArray[np.float32]:
        """Return the logits [batch, vocab] of the last token."""
        assert self._kept is not None, "reset comes first"
        states: NDArray[np.float32] = np.tanh(self._kept.totals).astype(np.float32)
        return states @ self._head.T

    def memory(self) -> Memory:
        """Return the bytes of the tables and the sums."""
        weights = self._embedding.nbytes + self._head.nbytes
        cache = 0 if self._kept is None else self._kept.totals.size * _FLOAT64_BYTES
        return Memory(0, weights, cache, None)

    def close(self) -> None:
        """Drop all sequences."""
        self._kept = None

    def _append(self, tokens: Tokens) -> None:
        assert self._kept is not None, "reset comes first"
        check_tokens("replay", tokens, self._kept.length + 1, self._kept.capacity, len(self._embedding))
        self._kept.totals = _DECAY * self._kept.totals + self._embedding[tokens]
        self._kept.length += 1

    def _choice(self) -> Tokens:
        chosen: Tokens = self.logits().argmax(axis=1).astype(np.int64)
        return chosen


def prepare_replay(spec: EngineSpec) -> Path:
    """Return a place that is not read; nothing is written."""
    del spec
    return Path()


def open_replay(spec: EngineSpec, place: Path) -> ReplayEngine:
    """Return the same formulas for every model and variant."""
    del spec, place
    return ReplayEngine()
