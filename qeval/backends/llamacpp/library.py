"""A GGUF file and its contexts in llama.cpp, through llama-cpp-python's binding of its C interface.

Its class `Llama` holds one sequence; the functions beneath it hold as many as a context is made for, each with a
stream of keys and values of its own. What llama.cpp says of a failure goes to its log alone, so a file that it can't
open and a lack of memory look alike from here.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qeval.backends.llamacpp.cache_types import F16_CACHE, CacheTypes, rotations_as
from qeval.errors import QevalError, UsageError
from qeval.models.gguf.reader import open_gguf

LLAMACPP = "llama.cpp"
MODULE = "llama_cpp"
INSTALL = "pip install 'qeval[llamacpp]'"
_FLOATS = ("F32", "F16", "BF16")
_MOST_TOKENS = 2048
"""In one call of `llama_decode`; its own default."""
_MOST_LOGITS = 1 << 26
"""In one call: llama.cpp holds them all, 256 MiB in fp32."""
_STEP = 256
"""llama.cpp rounds a context up to so many tokens."""
_ALL_LAYERS = 1 << 16
_NO_ROOM = 1


class Token(NamedTuple):
    """One token to run: its place in its sequence, and whether its logits are wanted."""

    id: int
    position: int
    sequence: int = 0
    wanted: bool = True


class Model:
    """An open GGUF file. `max_length` is the context that it was trained for, `weights_bytes` as llama.cpp counts."""

    def __init__(self, file: Path, device: str = "cpu") -> None:
        """`device` is torch's name: on `cuda` all layers go to the GPU, on `cpu` none.

        Raises:
            UsageError: the file is no GGUF that llama.cpp runs, this build has no GPU, or it can't be loaded.
        """
        self.library = _loaded()
        on_gpu = device != "cpu"
        if on_gpu and not self.library.llama_supports_gpu_offload():
            raise UsageError(f"This llama-cpp-python is built for the CPU and {device} was asked for; build it for it.")
        self._log = self.library.llama_log_callback(_silent)  # kept: llama.cpp calls it for as long as it lives
        self.library.llama_log_set(self._log, ctypes.c_void_p(0))
        self.library.llama_backend_init()
        self.weights, self.disk_bytes = describe_weights(file), file.stat().st_size
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = _ALL_LAYERS if on_gpu else 0
        self.handle = self.library.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.handle:
            raise UsageError(f"llama.cpp can't open '{file}': it is no GGUF of a language model, or there is no room.")
        self.vocab_size = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.handle)))
        self.max_length = int(self.library.llama_model_n_ctx_train(self.handle))
        self.weights_bytes = int(self.library.llama_model_size(self.handle))
        self.provider = "GPU" if on_gpu else "CPU"

    def close(self) -> None:
        """Let it go; its contexts go first."""
        if self.handle:
            self.library.llama_model_free(self.handle)
            self.handle = None


class Context:
    """Room for the keys and values of `sequences` of up to `capacity` tokens each."""

    def __init__(
        self,
        model: Model,
        sequences: int,
        capacity: int,
        *,
        threads: int,
        flash: bool = True,
        types: CacheTypes = F16_CACHE,
    ) -> None:
        """Open a context of a model.

        `flash`: attention as llama.cpp chooses; flash attention sums in fp16, so that logits depend on how a
        sequence was cut into calls. `types`: of keys and values; where they need flash attention, it is on.

        Raises:
            MemoryError: there is no room.
        """
        self._model, self._library, self._types = model, model.library, types
        self.sequences, self.capacity = sequences, -(-capacity // _STEP) * _STEP
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = sequences * self.capacity, sequences
        parameters.n_batch = _MOST_TOKENS
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k, parameters.type_v = types.numbers
        if types.needs_flash:
            parameters.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        elif not flash:
            parameters.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.kv_unified, parameters.no_perf = False, True
        with rotations_as(types):
            self._handle = self._library.llama_init_from_model(model.handle, parameters)
        if not self._handle:
            raise MemoryError(f"llama.cpp made no context for {sequences} sequences of {capacity} tokens ({types}).")

    @property
    def threads(self) -> int:
        """The number of threads that compute."""
        return int(self._library.llama_n_threads(self._handle))

    @property
    def cache_bytes(self) -> int:
        """The bytes of llama.cpp's plain cache: layers x heads x (key and value) x tokens, for the whole context."""
        model, ask = self._model.handle, self._library
        width = ask.llama_model_n_embd(model) // ask.llama_model_n_head(model)
        pairs = ask.llama_model_n_layer(model) * ask.llama_model_n_head_kv(model) * width
        return int(pairs * ask.llama_n_ctx(self._handle) * self._types.bytes_of_both)

    def forget(self) -> None:
        """Drop the keys and values of all sequences."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._handle), False)

    def keep(self, length: int) -> bool:
        """Drop what follows the first `length` tokens of sequence 0; False where this kind of memory can't."""
        memory = self._library.llama_get_memory(self._handle)
        return bool(self._library.llama_memory_seq_rm(memory, 0, length, -1))

    def run(self, tokens: Sequence[Token]) -> NDArray[np.float32]:
        """Return the logits [wanted tokens, vocab] after each of the tokens whose logits are wanted, in their order.

        Raises:
            MemoryError: there is no room for their keys and values. QevalError: the forward pass failed.
        """
        found = np.empty((sum(token.wanted for token in tokens), self._model.vocab_size), np.float32)
        done = 0
        for part in _parts(tokens, max(1, _MOST_LOGITS // self._model.vocab_size)):
            done += self._decode(part, found[done:])
        return found

    def close(self) -> None:
        """Let the keys and values go."""
        if self._handle is not None:
            self._library.llama_free(self._handle)
            self._handle = None

    def _decode(self, tokens: Sequence[Token], out: NDArray[np.float32]) -> int:
        """Run tokens at once and write the wanted rows into the first of `out`; how many these are."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token.id, token.position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, token.sequence
                batch.logits[index] = token.wanted
            _check(self._library.llama_decode(self._handle, batch))
        finally:
            self._library.llama_batch_free(batch)
        wanted = [index for index, token in enumerate(tokens) if token.wanted]
        for row, index in enumerate(wanted):
            found = self._library.llama_get_logits_ith(self._handle, index)
            out[row] = np.ctypeslib.as_array(found, shape=(self._model.vocab_size,))
        return len(wanted)


def version() -> str:
    """Return the version of the binding, which holds llama.cpp: `llama-cpp-python 0.3.36`.

    Raises:
        UsageError: it can't be loaded.
    """
    return f"llama-cpp-python {_loaded().__version__}"


def describe_weights(file: Path) -> str:
    """Say how a file's matrices are held, the commonest type first: `210 x Q4_0, scales in fp16; 1 x F32`.

    Raises:
        UsageError: it is torn or no GGUF.
    """
    kinds = Counter(tensor.tensor_type.name for tensor in open_gguf(file).tensors if len(tensor.shape) > 1)
    return "; ".join(
        f"{count} x {kind}" + ("" if kind in _FLOATS else ", scales in fp16") for kind, count in kinds.most_common()
    )


def _loaded() -> Any:
    try:
        return import_module(MODULE)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries were not built, or for another machine
        raise UsageError(f"llama-cpp-python can't be loaded ({error}); install it anew: {INSTALL}.") from error


def _parts(tokens: Sequence[Token], most_wanted: int) -> Iterator[Sequence[Token]]:
    """Yield what is run at once: no more tokens, and no more wanted ones, than llama.cpp is to hold."""
    start = wanted = 0
    for index, token in enumerate(tokens):
        if index - start == _MOST_TOKENS or (token.wanted and wanted == most_wanted):
            yield tokens[start:index]
            start, wanted = index, 0
        wanted += token.wanted
    yield tokens[start:]


def _check(code: int) -> None:
    if code == _NO_ROOM:
        raise MemoryError("llama.cpp found no room for keys and values.")
    if code:
        raise QevalError(f"llama.cpp failed in a forward pass (llama_decode gave {code}).")


def _silent(level: int, text: bytes, data: Any) -> None:
    """Ignore what llama.cpp has to tell, since its functions say what failed."""
