"""llama.cpp through llama-cpp-python's binding of its C interface, on a GGUF file.

Its class `Llama` holds one sequence; the functions beneath it hold as many as a context is made for, each with a
stream of keys and values of its own, in fp16 as llama.cpp serves. Logits are made for the last position of each
sequence. What it says of a failure goes to its log alone, so a file that it can't open and a lack of memory look alike
from here.
"""

import ctypes
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from qeval.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.engines.gpu import bytes_in_use
from qeval.engines.opening import Opening
from qeval.errors import QevalError, UsageError

NAME = "llama.cpp"
_F32 = 0
"""ggml's number of the type."""
_FLOATS = ("F32", "F16", "BF16")
_MOST_TOKENS = 2048
"""In one call of `llama_decode`; its own default."""
_ALL_LAYERS = 1 << 16
_NO_ROOM = 1


class LlamaCppEngine:
    """A GGUF file, open in llama.cpp."""

    compile_seconds = 0.0
    """Nothing is compiled."""

    def __init__(self, file: Path, *, threads: int = 1, device: str = "cpu", exact: bool = False) -> None:
        """`device` is torch's name: on `cuda` all layers go to the GPU, on `cpu` none.

        An `exact` engine keeps keys and values in fp32 and sums without flash attention, which rounds to fp16 on the
        way (2e-3 of the largest logit, where it is 1e-6 without): for comparing with other engines, not for speed.

        Raises:
            UsageError: the file is no GGUF that llama.cpp runs, or this build has no GPU.
        """
        self._llama = import_module("llama_cpp")
        on_gpu = device != "cpu"
        if on_gpu and not self._llama.llama_supports_gpu_offload():
            raise UsageError(f"This llama-cpp-python is built for the CPU and {device} was asked for; build it for it.")
        self._log = self._llama.llama_log_callback(_silent)  # kept: llama.cpp calls it for as long as it lives
        self._llama.llama_log_set(self._log, ctypes.c_void_p(0))
        self._llama.llama_backend_init()
        self._weights, self._disk_bytes = weights_told(file), file.stat().st_size
        parameters = self._llama.llama_model_default_params()
        parameters.n_gpu_layers = _ALL_LAYERS if on_gpu else 0
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), parameters)
        if not self._model:
            raise UsageError(f"llama.cpp can't open '{file}': it is no GGUF of a language model, or there is no room.")
        self._vocab_size = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self.max_length = int(self._llama.llama_model_n_ctx_train(self._model))
        self._weights_bytes = int(self._llama.llama_model_size(self._model))
        self._threads, self._device, self._exact = threads, "GPU" if on_gpu else "CPU", exact
        self._gpu = int(device.partition(":")[2] or 0) if on_gpu else None
        self._context: Any = None
        self._room, self._length = (0, 0), 0
        self._logits: NDArray[np.float32] = np.empty((0, 0), np.float32)

    @property
    def identity(self) -> Identity:
        """What ran."""
        threads = self._llama.llama_n_threads(self._context) if self._context else self._threads
        dtype = "fp32" if self._exact else "fp32, keys and values fp16"
        return Identity(
            NAME, self._device, dtype, self._weights, threads, f"llama-cpp-python {self._llama.__version__}"
        )

    def reset(self, batch: int, capacity: int) -> None:
        """Forget all sequences; a context that fits is taken again.

        Raises:
            UsageError: llama.cpp holds no so many sequences, or none that long.
            MemoryError: there is no room for the keys and values.
        """
        most = int(self._llama.llama_max_parallel_sequences())
        check_room(NAME, batch, capacity, max_length=self.max_length, largest_batch=most)
        if self._context is None or self._room != (batch, capacity):
            self._free_context()
            self._context = self._new_context(batch, capacity)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        self._room, self._length = (batch, capacity), 0
        self._logits = np.empty((batch, self._vocab_size), np.float32)

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt]."""
        return self._append(prompts)

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch]."""
        return self._append(tokens[:, None])

    def logits(self) -> NDArray[np.float32]:
        """The logits [batch, vocab] of the last token."""
        return self._logits.copy()

    def memory(self) -> Memory:
        """Weights as llama.cpp counts them; keys and values for the whole context, which is how they are held."""
        in_use = None if self._gpu is None else bytes_in_use(self._gpu)
        return Memory(self._disk_bytes, self._weights_bytes, self._cache_bytes(), in_use)

    def close(self) -> None:
        """Let the context go, then the model."""
        self._free_context()
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def _append(self, ids: Tokens) -> Tokens:
        assert self._context is not None, "reset comes first"
        length = self._length + ids.shape[1]
        check_tokens(NAME, ids, length, self._room[1], self._vocab_size)
        places = [(row, column) for row in range(len(ids)) for column in range(ids.shape[1])]
        for start in range(0, len(places), _MOST_TOKENS):
            self._decode(ids, places[start : start + _MOST_TOKENS])
        self._length = length
        chosen: Tokens = self._logits.argmax(axis=1)
        return chosen

    def _decode(self, ids: Tokens, places: list[tuple[int, int]]) -> None:
        """Run the tokens at these (row, column), and keep the logits of each row's last one."""
        batch = self._llama.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for index, (row, column) in enumerate(places):
                batch.token[index], batch.pos[index] = int(ids[row, column]), self._length + column
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = column == ids.shape[1] - 1
            self._check(self._llama.llama_decode(self._context, batch))
        finally:
            self._llama.llama_batch_free(batch)
        for index, (row, column) in enumerate(places):
            if column == ids.shape[1] - 1:
                found = self._llama.llama_get_logits_ith(self._context, index)
                self._logits[row] = np.ctypeslib.as_array(found, shape=(self._vocab_size,))

    @staticmethod
    def _check(code: int) -> None:
        if code == _NO_ROOM:
            raise MemoryError("llama.cpp found no room for keys and values.")
        if code:
            raise QevalError(f"llama.cpp failed in a forward pass (llama_decode gave {code}).")

    def _new_context(self, batch: int, capacity: int) -> Any:
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = batch * (-(-capacity // 256) * 256), batch  # 256: its own step
        parameters.n_batch = _MOST_TOKENS
        parameters.n_threads = parameters.n_threads_batch = self._threads
        if self._exact:
            parameters.type_k = parameters.type_v = _F32
            parameters.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.kv_unified, parameters.no_perf = False, True
        context = self._llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise MemoryError(f"llama.cpp made no context for {batch} sequences of {capacity} tokens.")
        return context

    def _free_context(self) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context = None

    def _cache_bytes(self) -> int:
        """What llama.cpp's plain cache takes: layers x heads x (key and value) x tokens."""
        if self._context is None:
            return 0
        model, ask = self._model, self._llama
        width = ask.llama_model_n_embd(model) // ask.llama_model_n_head(model)
        values = 2 * ask.llama_model_n_layer(model) * ask.llama_model_n_head_kv(model) * width
        return int(values * ask.llama_n_ctx(self._context) * (4 if self._exact else 2))


def weights_told(file: Path) -> str:
    """How a file's matrices are held, the commonest type first: `210 x Q4_0, scales in fp16; 1 x F32`.

    Raises:
        UsageError: it is torn or no GGUF.
    """
    try:
        tensors = GGUFReader(file).tensors
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{file}' is torn or not a GGUF file ({error}).") from error
    kinds = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return "; ".join(
        f"{count} x {kind}" + ("" if kind in _FLOATS else ", scales in fp16") for kind, count in kinds.most_common()
    )


def open_engine(opening: Opening, place: Path) -> LlamaCppEngine:
    """The engine on the file that `gguf_file.prepare` found or made.

    Raises:
        UsageError: as `LlamaCppEngine`. MemoryError: as `LlamaCppEngine.reset`.
    """
    return LlamaCppEngine(place, threads=opening.threads, device=opening.device)


def _silent(level: int, text: bytes, data: Any) -> None:
    """What llama.cpp has to tell: nothing is read of it, since its functions say what failed."""
