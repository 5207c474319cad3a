"""ONNX Runtime's InferenceSession as a server would hold it: keys and values stay on the device, bound in and out.

The graph is that of the folder with its head on the last position (`backends.onnx.serving`). Where its attention is
GroupQueryAttention, past and present are one buffer of the whole capacity, to which a step appends in place; measured
against two buffers taking turns and against buffers that grow by a token a step, this was the fastest (13.6, 13.8 and
14.1 ms a token at 16 tokens, 21, 25 and 23 ms at 1,024; SmolLM2-135M in INT4, one thread). Other graphs concatenate,
so each step's present becomes the next one's past as it is. Nothing of this needs torch, nor its memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from qeval.backends.onnx.decoder import PastInput
from qeval.backends.onnx.inspection import OnnxFacts, inspect_folder
from qeval.backends.onnx.packages import first_line_of, import_runtime, require_runtime, runtime_errors
from qeval.backends.onnx.providers import choose_provider, open_session
from qeval.backends.onnx.serving import Served, read_served
from qeval.backends.onnx.settings import QDQ_LEVEL, onnx_rope_limit, place_of, session_entries
from qeval.bench.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.gpu import bytes_in_use
from qeval.errors import QevalError, UsageError, is_out_of_memory

ONNXRUNTIME = "onnxruntime"
DTYPES: dict[type, str] = {np.float32: "fp32", np.float16: "fp16"}

_ON_NVIDIA = ("cuda", "tensorrt", "trt-rtx")

ValueOf = Callable[[NDArray[Any]], Any]
"""Puts an array on the device, as a value of ONNX Runtime's."""


class Cache(Protocol):
    """The keys and values of all layers, on the device."""

    def bind(self, binding: Any) -> None:
        """Name the past and the present of the next run."""
        ...

    def keep(self, presents: Sequence[Any]) -> None:
        """Take what the run gave, in the order of the layers."""
        ...

    def size_bytes(self) -> int:
        """Return the bytes in memory."""
        ...


class InPlace:
    """One buffer [batch, heads, capacity, head size] a layer's keys or values: a run appends to what it reads."""

    def __init__(self, pasts: Sequence[PastInput], batch: int, capacity: int, value_of: ValueOf) -> None:
        """Allocate room for `batch` sequences of `capacity` tokens."""
        self._pasts = pasts
        self._values = [value_of(np.zeros((batch, p.heads, capacity, p.head_size), p.dtype)) for p in pasts]

    def bind(self, binding: Any) -> None:
        """Bind the same buffers as past and as present."""
        for past, value in zip(self._pasts, self._values, strict=True):
            binding.bind_ortvalue_input(past.name, value)
            binding.bind_ortvalue_output(past.present, value)

    def keep(self, presents: Sequence[Any]) -> None:
        """Do nothing: the buffers stay where they are."""

    def size_bytes(self) -> int:
        """Return the bytes of the buffers, full or not."""
        return sum(value.tensor_size_in_bytes() for value in self._values)


class Growing:
    """A value [batch, heads, tokens, head size] a layer's keys or values, a new one each run, never on the host."""

    def __init__(self, pasts: Sequence[PastInput], batch: int, place: tuple[str, int], value_of: ValueOf) -> None:
        """Take the device and its number."""
        self._pasts, self._place = pasts, place
        self._values = [value_of(np.zeros((batch, p.heads, 0, p.head_size), p.dtype)) for p in pasts]

    def bind(self, binding: Any) -> None:
        """Bind the last run's presents as past, and presents wherever the runtime makes room on the device."""
        for past, value in zip(self._pasts, self._values, strict=True):
            binding.bind_ortvalue_input(past.name, value)
            binding.bind_output(past.present, *self._place)

    def keep(self, presents: Sequence[Any]) -> None:
        """Take the outputs as the next run's past."""
        self._values = list(presents)

    def size_bytes(self) -> int:
        """Return the bytes of the last run's outputs."""
        return sum(value.tensor_size_in_bytes() for value in self._values)


class OrtEngine:
    """A folder's decoder, open on one provider."""

    compile_seconds = 0.0
    """Graph optimizations belong to opening."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 1, device_id: int = 0) -> None:
        """Open a folder; `provider` goes by our name (`PROVIDERS`), `threads` are the CPU's.

        Raises:
            UsageError: the folder or its graph can't be used, or the provider isn't there.
            QevalError: ONNX Runtime refuses the graph, or nodes fell back to another provider.
            MemoryError: there is no room for the weights.
        """
        facts = facts_of(folder)
        self._served, self.max_length = read_served(facts), int(facts.context_length or 0)
        self._rope_limit = onnx_rope_limit(facts)
        chosen, entries = choose_provider(provider), session_entries(facts)
        self._session = _opened(self._served, lambda graph: open_session(
            graph, chosen, threads=threads, entries=entries, device_id=device_id
        ))  # fmt: skip
        self._place, self._ort_value = place_of(chosen, device_id), import_runtime().OrtValue
        versions = require_runtime()
        self.identity = Identity(
            engine=ONNXRUNTIME,
            provider=chosen.onnx_name,
            dtype=DTYPES[self._served.pasts[0].dtype],
            weights=weights_told(facts),
            threads=self._session.get_session_options().intra_op_num_threads,
            version=f"{versions.distribution} {versions.version}",
        )
        self._disk_bytes, self._weights_bytes = disk_bytes(facts), facts.size_bytes
        self._gpu = gpu_of(provider, device_id)
        self._binding: Any = None
        self._cache: Cache | None = None
        self._room, self._length = (0, 0), 0
        self._tokens: NDArray[np.int64] = np.empty((0, 0), np.int64)

    def reset(self, batch: int, capacity: int) -> None:
        """Drop all sequences; buffers that fit are used again.

        Raises:
            UsageError: the sequence is longer than the context.
            MemoryError: there is no room for the keys and values.
        """
        check_room(ONNXRUNTIME, batch, capacity, max_length=self.max_length)
        if self._cache is None or self._room != (batch, capacity) or not self._served.in_place:
            self._cache = None  # the old one goes first: two of them may not fit
            self._cache = self._new_cache(batch, capacity)
            self._bind_anew(batch)
            self._tokens = np.empty((batch, capacity), np.int64)
        self._room, self._length = (batch, capacity), 0

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt]."""
        return self._append(prompts)

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch].

        A step across LongRoPE's limit runs the whole sequence again, since all its keys are turned otherwise there.

        Raises:
            QevalError: there is no room for it, or the forward failed.
        """
        if self._length != self._rope_limit:
            return self._append(tokens[:, None])
        everything = np.concatenate([self._tokens[:, : self._length], tokens[:, None]], axis=1)
        self.reset(*self._room)
        return self._append(everything)

    def logits(self) -> NDArray[np.float32]:
        """Return the logits [batch, vocab] of the last token."""
        return self._logits[:, 0].astype(np.float32)

    def memory(self) -> Memory:
        """Return the initializers as stored, of which a kernel may have a packed copy, and the keys and values."""
        cache = 0 if self._cache is None else self._cache.size_bytes()
        in_use = None if self._gpu is None else bytes_in_use(self._gpu)
        return Memory(self._disk_bytes, self._weights_bytes, cache, in_use)

    def close(self) -> None:
        """Let the session and the buffers go."""
        self._binding = self._cache = self._session = None

    def _append(self, ids: Tokens) -> Tokens:
        before, length = self._length, self._length + ids.shape[1]
        check_tokens(ONNXRUNTIME, ids, length, self._room[1], self._served.vocab_size)
        self._run(ids, length)
        self._tokens[:, before:length], self._length = ids, length
        chosen: Tokens = self._logits[:, 0].argmax(axis=1)
        return chosen

    def _run(self, ids: Tokens, length: int) -> None:
        """Run one forward pass over [batch, new tokens], which end at `length`."""
        assert self._cache is not None, "reset comes first"
        batch, served, binding = len(ids), self._served, self._binding
        kinds = served.integers
        binding.bind_cpu_input(served.ids, np.ascontiguousarray(ids, kinds[served.ids]))
        if served.mask:
            binding.bind_cpu_input(served.mask, np.ones((batch, length), kinds[served.mask]))
        if served.positions:
            first = length - ids.shape[1]
            places = np.tile(np.arange(first, length, dtype=kinds[served.positions]), (batch, 1))
            binding.bind_cpu_input(served.positions, places)
        if not served.in_place:
            self._cache.bind(binding)
        try:
            self._session.run_with_iobinding(binding)
        except runtime_errors() as error:
            _failed(error, "failed in a forward pass")
        if not served.in_place:
            self._cache.keep(binding.get_outputs()[1:])

    def _new_cache(self, batch: int, capacity: int) -> Cache:
        try:
            if self._served.in_place:
                return InPlace(self._served.pasts, batch, capacity, self._value_of)
            return Growing(self._served.pasts, batch, self._place, self._value_of)
        except runtime_errors() as error:
            _failed(error, "could not make room for keys and values")

    def _bind_anew(self, batch: int) -> None:
        """Return a binding whose first output is the logits, written to an array of ours."""
        assert self._cache is not None
        port = next(each for each in self._session.get_outputs() if each.name == self._served.logits)
        kind = np.float16 if "float16" in port.type else np.float32
        self._logits = np.zeros((batch, 1, self._served.vocab_size), kind)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_output(self._served.logits, self._ort_value.ortvalue_from_numpy(self._logits))
        self._cache.bind(self._binding)

    def _value_of(self, array: NDArray[Any]) -> Any:
        return self._ort_value.ortvalue_from_numpy(array, *self._place)


def open_onnxruntime(spec: EngineSpec, place: Path) -> OrtEngine:
    """Return the engine on the folder that `onnx_folder.prepare` returned.

    Raises:
        UsageError, QevalError, MemoryError: as `OrtEngine`.
    """
    return OrtEngine(place, spec.provider, spec.threads, device_id_of(spec.device))


def device_id_of(device: str) -> int:
    """Return the number in torch's name of a device.

    >>> device_id_of("cuda:1"), device_id_of("cpu")
    (1, 0)
    """
    return int(device.partition(":")[2] or 0)


def gpu_of(provider: str, device_id: int) -> int | None:
    """Return the number of the NVIDIA GPU that a provider runs on; None for a provider of other hardware.

    >>> gpu_of("cuda", 1), gpu_of("cpu", 0)
    (1, None)
    """
    return device_id if provider in _ON_NVIDIA else None


def facts_of(folder: Path) -> OnnxFacts:
    """Return what an engine needs to know of an ONNX folder.

    Raises:
        UsageError: it can't be used, or names no context length.
    """
    facts = inspect_folder(folder, needs_tokenizer=False)
    if facts.context_length is None:
        raise UsageError(f"{facts.files.config} names no context length, so no sequence is known to fit.")
    return facts


def disk_bytes(facts: OnnxFacts) -> int:
    """Return the bytes of the graph and its weights."""
    return sum(file.stat().st_size for file in facts.contents if file != facts.files.config)


def weights_told(facts: OnnxFacts) -> str:
    """Return how the matrices are stored; a DequantizeLinear's accuracy level is the session's."""
    if not any(matrix.op == "DequantizeLinear" for matrix in facts.matrices):
        return facts.weights
    return f"{facts.weights}; fused at accuracy level {session_entries(facts).get(QDQ_LEVEL, '4 (the default)')}"


def _opened(served: Served, open_it: Callable[[bytes], Any]) -> Any:
    try:
        return open_it(served.graph)
    except QevalError as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise


def _failed(error: Exception, what: str) -> NoReturn:
    """Return an error of the runtime as one of ours.

    Raises:
        MemoryError: it says that memory ran out. QevalError: it says something else.
    """
    if is_out_of_memory(error):
        raise MemoryError(f"ONNX Runtime {what}: {first_line_of(error)}.") from error
    raise QevalError(f"ONNX Runtime {what}: {first_line_of(error)}.") from error
