"""The backend `llama.cpp`: GGUF files scored by llama.cpp's own kernels, token ids in, logits out.

Its products by quantized weights round activations to 8 bits in blocks of 32 (or 256), its keys and values are fp16:
that is what its users run. Only flash attention is left out: its sums in fp16 depend on how a sequence was cut into
calls. The head is the file's own, so a state is a row of logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qeval.backends.base import Prefix
from qeval.backends.llamacpp.library import INSTALL, MODULE, NAME, Context, Model, Token, version
from qeval.errors import QevalError, UsageError
from qeval.metrics.tokens import block_rows
from qeval.types import Request

_LEAST_ROOM = 512

Parts = tuple[tuple[int, ...], ...]
"""A prefix as it is run: part after part, so that its keys and values are the same however often they are made."""


def require_llama_cpp() -> None:
    """Refuse to go on without llama-cpp-python.

    Raises:
        UsageError: it says what installs it.
    """
    if find_spec(MODULE) is None:
        raise UsageError(f"--backend {NAME} needs llama-cpp-python, not installed here: {INSTALL}.")


@dataclass(frozen=True, eq=False)
class LlamaPrefix:
    """Token ids that requests continue. Their keys and values are made when the first one does."""

    owner: object
    parts: Parts

    @property
    def length(self) -> int:
        """How many tokens the prefix holds."""
        return sum(map(len, self.parts))


class LlamaSession:
    """An open GGUF file that answers one sequence after another; states are logits, [vocab] fp32 each."""

    packs = True

    def __init__(self, model: Model, *, threads: int, ids: int) -> None:
        """`ids` beyond the first so many are left out of the logits: they are padding."""
        self._model, self._threads, self._width = model, threads, ids
        self._owner = object()
        self._context: Context | None = None
        self._held: Parts = ()

    @property
    def max_length(self) -> int:
        """The context length that the file states."""
        return self._model.max_length

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return self._width

    @property
    def weights(self) -> str:
        """How the file's matrices are held, as `library.weights_told`."""
        return self._model.weights

    @property
    def block_rows(self) -> int:
        """The positions whose logits are compared at a time."""
        return block_rows(self.vocab_size)

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> LlamaPrefix:
        """A prefix, after another if one is given.

        Raises:
            QevalError: it is longer than the context.
        """
        prefix = LlamaPrefix(self._owner, (*self._own(outer), tuple(tokens)))
        self._check_length(prefix.length)
        return prefix

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """The logits at each request's positions, [positions, vocab] fp32.

        Raises:
            QevalError: a sequence is longer than the context, or there is no room for it, or the forward pass failed.
        """
        parts = self._own(prefix)
        start = sum(map(len, parts))
        longest = start + max(len(request.tokens) for request in requests)
        self._check_length(longest)
        try:
            context = self._with_room(longest)
            return [self._states(context, request, parts, start) for request in requests]
        except MemoryError as error:
            raise QevalError(f"{error} It is one sequence of {longest} tokens; give a smaller --window.") from error

    def logits(self, states: Tensor) -> Tensor:
        """The states, which are logits."""
        return states.float()

    def close(self) -> None:
        """Let the context go, then the model."""
        if self._context is not None:
            self._context.close()
        self._context, self._held = None, ()
        self._model.close()

    def _states(self, context: Context, request: Request, parts: Parts, start: int) -> Tensor:
        self._hold(context, parts)
        wanted = set(request.positions)
        logits = context.run(
            [Token(token, start + place, wanted=place in wanted) for place, token in enumerate(request.tokens)]
        )
        return torch.from_numpy(logits[:, : self._width])

    def _hold(self, context: Context, parts: Parts) -> None:
        """Have the context hold a prefix and no more; parts that it holds already are not run again."""
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(self._held, parts, strict=False))])
        length = sum(map(len, parts[:same]))
        if not context.keep(length):  # a kind of memory that goes back to its beginning alone
            context.forget()
            same = length = 0
        for part in parts[same:]:
            context.run([Token(token, length + place, wanted=False) for place, token in enumerate(part)])
            length += len(part)
        self._held = parts

    def _with_room(self, length: int) -> Context:
        if self._context is None or self._context.capacity < length:
            if self._context is not None:
                self._context.close()
            self._context, self._held = None, ()
            room = min(self.max_length, max(_LEAST_ROOM, 1 << (length - 1).bit_length()))
            self._context = Context(self._model, 1, room, threads=self._threads, flash=False)
        return self._context

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise QevalError(f"A sequence of {length} tokens is longer than the context of {self.max_length}.")

    def _own(self, prefix: Prefix | None) -> Parts:
        if prefix is None:
            return ()
        if not isinstance(prefix, LlamaPrefix) or prefix.owner is not self._owner:
            raise TypeError("A prefix belongs to the session that made it.")
        return prefix.parts


@dataclass(frozen=True)
class LlamaCppBackend:
    """Opens GGUF files. `device` is torch's name: on `cuda` all layers run on the GPU. `ids`: the baseline's."""

    threads: int
    device: str
    ids: int
    name = NAME

    @property
    def runtime(self) -> str:
        """What runs them: `llama-cpp-python 0.3.36`."""
        return version()

    @property
    def provider(self) -> str:
        """Where."""
        return "CPU" if self.device == "cpu" else "GPU"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the backend that changes a number."""
        return {"runtime": self.runtime, "provider": self.provider, "cache": "fp16", "flash": False}

    @contextmanager
    def open(self, file: Path) -> Iterator[LlamaSession]:
        """A session of a file; its memory is let go when the block ends.

        Raises:
            UsageError: llama.cpp can't open it, or it has no logits for all of the baseline's ids.
        """
        model = Model(file, self.device)
        session = LlamaSession(model, threads=self.threads, ids=self.ids)
        try:
            if model.vocab_size < self.ids:
                raise UsageError(
                    f"'{file}' gives logits of {model.vocab_size} ids, the baseline of {self.ids}: the two "
                    "cannot be compared."
                )
            yield session
        finally:
            session.close()
