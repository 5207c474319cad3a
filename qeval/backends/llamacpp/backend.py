"""The backend `llama.cpp`: GGUF files scored by llama.cpp's own kernels, token ids in, logits out.

Its products by quantized weights round activations to 8 bits in blocks of 32 (or 256), its keys and values are fp16:
that is what its users run. A scheme's keys and values may be of llama.cpp's own types. Flash attention is left out
unless values are quantized, which need it: its sums in fp16 depend on how a sequence was cut into calls. The head is
the file's own, so a state is a row of logits.
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

from qeval.backends.base import Prefix, Saved, SessionDefaults, Target
from qeval.backends.llamacpp.cache_types import F16_CACHE, CacheTypes, cache_types, check_rotated_heads
from qeval.backends.llamacpp.gguf_writer import GGUF_VERSION, written
from qeval.backends.llamacpp.library import INSTALL, LLAMACPP, MODULE, Context, Model, Token, version
from qeval.errors import QevalError, UsageError
from qeval.metrics.tokens import block_rows
from qeval.models.info import LoadedModel
from qeval.progress import Progress
from qeval.quant.scheme import Scheme
from qeval.store.run import RuntimeRecord
from qeval.types import Request

_LEAST_ROOM = 512

PrefixParts = tuple[tuple[int, ...], ...]
"""A prefix as it is run: part after part, so that its keys and values are the same however often they are made."""


def require_llama_cpp() -> None:
    """Refuse to go on without llama-cpp-python.

    Raises:
        UsageError: it says what installs it.
    """
    if find_spec(MODULE) is None:
        raise UsageError(f"--backend {LLAMACPP} needs llama-cpp-python, not installed here: {INSTALL}.")


@dataclass(frozen=True, eq=False)
class LlamaPrefix:
    """Token ids that requests continue. Their keys and values are made when the first one does."""

    owner: object
    parts: PrefixParts

    @property
    def length(self) -> int:
        """The prefix's length in tokens."""
        return sum(map(len, self.parts))


class LlamaSession(SessionDefaults):
    """An open GGUF file that answers one sequence after another; states are logits, [vocab] fp32 each."""

    packs = True

    def __init__(self, model: Model, *, threads: int, ids: int, types: CacheTypes = F16_CACHE) -> None:
        """`ids` beyond the first so many are left out of the logits: they are padding."""
        self._model, self._threads, self._width, self.types = model, threads, ids, types
        self._owner = object()
        self._context: Context | None = None
        self._held: PrefixParts = ()

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
        """The storage of the file's matrices, as `library.describe_weights`."""
        return self._model.weights

    @property
    def block_rows(self) -> int:
        """The positions whose logits are compared at a time."""
        return block_rows(self.vocab_size)

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> LlamaPrefix:
        """Return a prefix, after another if one is given.

        Raises:
            QevalError: it is longer than the context.
        """
        prefix = LlamaPrefix(self._owner, (*self._cast_prefix(outer), tuple(tokens)))
        self._check_length(prefix.length)
        return prefix

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the logits at each request's positions, [positions, vocab] fp32.

        Raises:
            QevalError: a sequence is longer than the context, or there is no room for it, or the forward pass failed.
        """
        parts = self._cast_prefix(prefix)
        start = sum(map(len, parts))
        longest = start + max(len(request.tokens) for request in requests)
        self._check_length(longest)
        try:
            context = self._with_room(longest)
            return [self._states(context, request, parts, start) for request in requests]
        except MemoryError as error:
            raise QevalError(f"{error} It is one sequence of {longest} tokens; give a smaller --window.") from error

    def logits(self, states: Tensor) -> Tensor:
        """Return the states, which are logits."""
        return states.float()

    def close(self) -> None:
        """Let the context go, then the model."""
        if self._context is not None:
            self._context.close()
        self._context, self._held = None, ()
        self._model.close()

    def _states(self, context: Context, request: Request, parts: PrefixParts, start: int) -> Tensor:
        self._hold(context, parts)
        wanted = set(request.positions)
        logits = context.run(
            [Token(token, start + place, wanted=place in wanted) for place, token in enumerate(request.tokens)]
        )
        return torch.from_numpy(logits[:, : self._width])

    def _hold(self, context: Context, parts: PrefixParts) -> None:
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
            self._context = Context(self._model, 1, room, threads=self._threads, flash=False, types=self.types)
        return self._context

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise QevalError(f"A sequence of {length} tokens is longer than the context of {self.max_length}.")

    def _cast_prefix(self, prefix: Prefix | None) -> PrefixParts:
        if prefix is None:
            return ()
        if not isinstance(prefix, LlamaPrefix) or prefix.owner is not self._owner:
            raise TypeError("A prefix belongs to the session that made it.")
        return prefix.parts


@dataclass(frozen=True, eq=False)
class LlamaCppBackend:
    """Opens GGUF files: those that variants were read from, and files that are written of all others.

    Attributes:
        loaded: The baseline, which files are written of.
        ids: The size of the baseline's vocabulary.
        threads: The CPU's.
        device: As torch names it: on `cuda` all layers run on the GPU.
        unwritten: Why no file can be written of this model, in a sentence; None where one can.
    """

    loaded: LoadedModel
    ids: int
    threads: int
    device: str
    unwritten: str | None = None
    name = LLAMACPP
    fake_quantizes = False

    @property
    def provider(self) -> str:
        """The device that files are run on."""
        return "CPU" if self.device == "cpu" else "GPU"

    @property
    def warnings(self) -> list[str]:
        """That the baseline can't be run, where no file is written of it."""
        lacks_floor = f"There is no noise floor of llama.cpp, the baseline in it: {self.unwritten}"
        return [lacks_floor] if self.unwritten else []

    def identity(self, target: Target) -> dict[str, Any]:
        """Return everything about the library, and how the target's file came to be, that changes a number."""
        types = self.types_of(_scheme_of(target))
        cache = "fp16" if types == F16_CACHE else str(types)
        backend = {"runtime": version(), "provider": self.provider, "cache": cache, "flash": types.needs_flash}
        return {"backend": backend, "file": "given" if _gguf_of(target) else f"written {GGUF_VERSION}"}

    def prepare(self, progress: Progress) -> None:
        """Do nothing: each file is written when it is opened."""

    @contextmanager
    def open(self, target: Target) -> Iterator[LlamaSession]:
        """Open the file of a target, or one that is written of it; its memory is let go of when the block ends.

        What is left in float in a file that is written is of fp32, as the other backends compute it.

        Raises:
            UsageError: A GGUF can't hold the variant, llama.cpp can't open it, has no such keys and values, or it lacks
                logits for some of the ids.
        """
        types = self.types_of(_scheme_of(target))
        file = _gguf_of(target) or self._written(target)
        model = Model(file, self.device)
        session = LlamaSession(model, threads=self.threads, ids=self.ids, types=types)
        try:
            if model.vocab_size < self.ids:
                raise UsageError(
                    f"'{file}' gives logits of {model.vocab_size} ids, the baseline of {self.ids}: the two "
                    "cannot be compared."
                )
            yield session
        finally:
            session.close()

    def describe(self, session: LlamaSession, target: Target) -> RuntimeRecord:
        """Return how an open file is run."""
        return RuntimeRecord(
            runtime=version(),
            provider=self.provider,
            nodes={},
            exporter=None if _gguf_of(target) else "qeval",
            format=None,
            accuracy_level=None,
            shares_prefixes="one",
            facts=[f"{session.weights}.", _attention(session.types)],
        )

    def types_of(self, scheme: Scheme) -> CacheTypes:
        """Return the types of a scheme's keys and values.

        Raises:
            UsageError: llama.cpp has none, or does not rotate heads of the model's size.
        """
        config = self.loaded.model.config.get_text_config()
        types = cache_types(scheme)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        check_rotated_heads(types, int(size))
        return types

    def _written(self, target: Target) -> Path:
        variant = target.variant() if isinstance(target, Saved) else target
        # of keys and values alone the weights are the float model's own
        is_float = variant is None or not (variant.quantized_matrices or variant.floats)
        return written(self.loaded, None if is_float else variant, "fp32")


def _scheme_of(target: Target) -> Scheme:
    """Return the scheme that a target is run with."""
    if target is None:
        return Scheme()
    return target.effective_scheme if isinstance(target, Saved) else target.scheme


def _attention(types: CacheTypes) -> str:
    """Return how products and attention are computed, as a sentence."""
    rounds = "Products by quantized weights round activations to 8 bits"
    if types == F16_CACHE:
        return f"{rounds}; keys and values are fp16, attention is not flash attention."
    if not types.needs_flash:
        return f"{rounds}; {types}; attention is not flash attention."
    return (
        f"{rounds}; {types}; flash attention, which quantized values need: its sums in fp16 depend on how a sequence "
        "is cut into calls."
    )


def _gguf_of(target: Target) -> Path | None:
    """Return the GGUF file that a target was read from."""
    return target.gguf if isinstance(target, Saved) else None
