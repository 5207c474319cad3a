"""llama.cpp on a GGUF file: a stream of keys and values for each sequence, in fp16 as llama.cpp serves.

Logits are made for the last position of each sequence.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qeval.backends.llamacpp.cache_types import F16_CACHE, CacheTypes
from qeval.backends.llamacpp.library import LLAMACPP, Context, Model, Token, version
from qeval.bench.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.gpu import bytes_in_use

_EXACT = CacheTypes("f32", "f32")


class LlamaCppEngine:
    """A GGUF file, open in llama.cpp."""

    compile_seconds = 0.0
    """Return 0: nothing is compiled."""

    def __init__(self, file: Path, *, threads: int = 1, device: str = "cpu", exact: bool = False) -> None:
        """Open a file; `device` is torch's name: on `cuda` all layers go to the GPU, on `cpu` none.

        An `exact` engine keeps keys and values in fp32 and sums without flash attention, which rounds to fp16 on the
        way (2e-3 of the largest logit, where it is 1e-6 without): for comparing with other engines, not for speed.

        Raises:
            UsageError: the file is no GGUF that llama.cpp runs, or this build has no GPU.
        """
        self._model = Model(file, device)
        self.max_length = self._model.max_length
        self._threads, self._exact = threads, exact
        self._gpu = None if device == "cpu" else int(device.partition(":")[2] or 0)
        self._context: Context | None = None
        self._room, self._length = (0, 0), 0
        self._logits: NDArray[np.float32] = np.empty((0, 0), np.float32)

    @property
    def identity(self) -> Identity:
        """Return what runs."""
        threads = self._context.threads if self._context else self._threads
        dtype = "fp32" if self._exact else "fp32, keys and values fp16"
        return Identity(LLAMACPP, self._model.provider, dtype, self._model.weights, threads, version())

    def reset(self, batch: int, capacity: int) -> None:
        """Drop all sequences; a context that fits is used again.

        Raises:
            UsageError: llama.cpp holds no so many sequences, or none that long.
            MemoryError: there is no room for the keys and values.
        """
        most = int(self._model.library.llama_max_parallel_sequences())
        check_room(LLAMACPP, batch, capacity, max_length=self.max_length, largest_batch=most)
        if self._context is None or self._room != (batch, capacity):
            self._free_context()
            self._context = Context(
                self._model,
                batch,
                capacity,
                threads=self._threads,
                flash=not self._exact,
                types=_EXACT if self._exact else F16_CACHE,
            )
        self._context.forget()
        self._room, self._length = (batch, capacity), 0

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt]."""
        return self._append(prompts)

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch]."""
        return self._append(tokens[:, None])

    def logits(self) -> NDArray[np.float32]:
        """Return the logits [batch, vocab] of the last token."""
        return self._logits.copy()

    def memory(self) -> Memory:
        """Return weights as llama.cpp counts them, and keys and values for the whole context, as they are allocated."""
        in_use = None if self._gpu is None else bytes_in_use(self._gpu)
        held = self._context.cache_bytes if self._context else 0
        return Memory(self._model.disk_bytes, self._model.weights_bytes, held, in_use)

    def close(self) -> None:
        """Let the context go, then the model."""
        self._free_context()
        self._model.close()

    def _append(self, ids: Tokens) -> Tokens:
        assert self._context is not None, "reset comes first"
        length = self._length + ids.shape[1]
        check_tokens(LLAMACPP, ids, length, self._room[1], self._model.vocab_size)
        last = ids.shape[1] - 1
        self._logits = self._context.run(
            [
                Token(int(ids[row, column]), self._length + column, row, column == last)
                for row in range(len(ids))
                for column in range(ids.shape[1])
            ]
        )
        self._length = length
        chosen: Tokens = self._logits.argmax(axis=1)
        return chosen

    def _free_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None


def open_llamacpp(spec: EngineSpec, place: Path) -> LlamaCppEngine:
    """Return the engine on the file that `gguf_file.prepare` returned.

    Raises:
        UsageError: as `LlamaCppEngine`. MemoryError: as `LlamaCppEngine.reset`.
    """
    return LlamaCppEngine(place, threads=spec.threads, device=spec.device)
