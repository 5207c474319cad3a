"""transformers in PyTorch: each variant's float values in the model's own matrices, keys and values in its own caches.

`pytorch-eager` grows its cache as tokens come. `pytorch-compile` has a static cache of the room asked for and compiles
the pass over one token, once for a batch of one and once for all larger ones; prompts are run as they are, since every
length would be compiled anew. Keys stay rotated as they are, as in transformers' own `generate`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from qeval.arithmetic import dtype_name
from qeval.backends.install import install
from qeval.backends.memory import has_bf16
from qeval.bench.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.errors import is_out_of_memory
from qeval.models.checkpoint.weights import weight_files
from qeval.models.load import check_finite, checkpoint_of, load_model
from qeval.models.source import ModelSource
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import Head, head_of
from qeval.models.structure.supported import context_length
from qeval.models.structure.trace import text_config
from qeval.store.variants import load_variant, read_manifest
from qeval.types import FloatType

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {kind: name for name, kind in _TYPES.items()}

_MOST_GRAPHS = 16
"""Compiled passes that dynamo keeps: two are needed, and a limit of one would be met in silence by running eagerly."""

Pass = Callable[[Tensor, Any], Tensor]
"""Token ids [batch, tokens] and a cache to the logits [batch, vocab] after the last of them, fp32."""


class TorchEngine:
    """A transformers model that is given one token after another."""

    def __init__(self, model: Any, head: Head, identity: Identity, disk_bytes: int | None = None) -> None:
        """Take a model in eval mode, and its head or a quantized one."""
        self._model, self._head, self.identity, self._disk_bytes = model, head, identity, disk_bytes
        self._final_states = FinalStates(model)
        self._cache: Any = None
        self._capacity = 0
        self._length = 0
        self._logits = torch.empty(0)

    @property
    def max_length(self) -> int:
        """Return the context length that the model's configuration states."""
        return context_length(text_config(self._model), type(self._model).__name__)

    @property
    def compile_seconds(self) -> float:
        """Return 0: nothing is compiled."""
        return 0.0

    def reset(self, batch: int, capacity: int) -> None:
        """Drop all sequences.

        Raises:
            UsageError: a sequence that long is beyond the context. MemoryError: there is no room.
        """
        check_room(self.identity.engine, batch, capacity, max_length=self.max_length)
        self._cache = None  # the old one goes before the new one comes
        self._logits = torch.empty(0)
        with _memory_errors():
            self._cache = self._new_cache(capacity)
        self._capacity, self._length = capacity, 0

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt]; the most likely next tokens [batch]."""
        return self._append(prompts, self._pass)

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch]; return the most likely next tokens [batch]."""
        return self._append(tokens[:, None], self._step_pass)

    def logits(self) -> NDArray[np.float32]:
        """Return the logits [batch, vocab] of the last pass."""
        logits: NDArray[np.float32] = self._logits.cpu().numpy()
        return logits

    def memory(self) -> Memory:
        """Return the bytes of parameters and buffers, and of the caches; a GPU's as torch has allocated them."""
        held = {t.data_ptr(): t.nbytes for t in (*self._model.parameters(), *self._model.buffers(), self._head.weight)}
        caches = [t.nbytes for layer in getattr(self._cache, "layers", ()) for t in _kept(layer)]
        on_gpu = self._model.device.type == "cuda"
        device = torch.cuda.memory_allocated(self._model.device) if on_gpu else None
        return Memory(self._disk_bytes, sum(held.values()), sum(caches), device)

    def close(self) -> None:
        """Let the model go."""
        self._model = self._head = self._cache = self._final_states = None  # type: ignore[assignment]

    def _new_cache(self, capacity: int) -> Any:
        del capacity  # it grows
        return DynamicCache(config=self._model.config)

    def _append(self, tokens: Tokens, run: Pass) -> Tokens:
        self._length += tokens.shape[1]
        check_tokens(self.identity.engine, tokens, self._length, self._capacity, self._head.vocab_size)
        with _memory_errors(), torch.no_grad():  # dynamo takes no tensors of the inference mode
            self._logits = run(torch.from_numpy(tokens).to(self._model.device), self._cache)
            chosen: Tokens = self._logits.argmax(dim=-1).cpu().numpy()
        return chosen

    def _pass(self, ids: Tensor, cache: Any) -> Tensor:
        return self._head.logits(self._final_states(ids, cache)[:, -1])

    _step_pass = _pass


class CompiledEngine(TorchEngine):
    """The same with a static cache, the pass over one token compiled."""

    def __init__(
        self, model: Any, head: Head, identity: Identity, disk_bytes: int | None = None, *, backend: str = "inductor"
    ) -> None:
        """Take the backend of torch.compile."""
        super().__init__(model, head, identity, disk_bytes)
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = _MOST_GRAPHS
        self._compiled: Pass = torch.compile(self._pass, backend=backend, dynamic=True, fullgraph=True)
        self._compile_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        """Return the seconds of the passes that something was compiled for."""
        return self._compile_seconds

    def _new_cache(self, capacity: int) -> Any:
        layers = text_config(self._model).num_hidden_layers
        return Cache(layers=[_RoomyLayer(capacity) for _ in range(layers)])

    def _step_pass(self, ids: Tensor, cache: Any) -> Tensor:
        before, start = _graphs(), time.perf_counter()
        logits = self._compiled(ids, cache)
        if _graphs() != before:
            self._compile_seconds += time.perf_counter() - start
        return logits


class _RoomyLayer(StaticLayer):  # type: ignore[misc]
    """A static layer that isn't tied to its address: a batch or a room of another size then needs no new graph.

    Sliding windows are masked and not dropped.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the room: [batch, heads, capacity, head size] of each."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = _room(key_states, self.max_cache_len)
        self.values = _room(value_states, self.max_cache_len)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=self.device)
        self.is_initialized = True


def _room(like: Tensor, capacity: int) -> Tensor:
    batch, heads, _, size = like.shape
    return like.new_zeros(batch, heads, capacity, size)


def _kept(layer: Any) -> tuple[Tensor, ...]:
    return (layer.keys, layer.values) if layer.is_initialized else ()


def _graphs() -> int:
    """Return how many graphs dynamo has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise torch's lack of memory in the block as Python's MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError("torch could not allocate memory") from error


def prepare_torch(spec: EngineSpec) -> Path:
    """Return the checkpoint's folder, fetched or converted if need be; a variant is verified.

    Raises:
        UsageError: there is no such model, or the variant's folder is none of qeval's.
    """
    if spec.variant is not None:
        read_manifest(spec.variant)
    return checkpoint_of(spec.model).folder


def open_eager(spec: EngineSpec, place: Path) -> TorchEngine:
    """Return the model of `place` with the variant's values, run as it is.

    Raises:
        UsageError: the device isn't there, or the variant can't be read. MemoryError: there is no room.
    """
    return TorchEngine(*_opened("pytorch-eager", spec, place))


def open_compiled(spec: EngineSpec, place: Path) -> CompiledEngine:
    """Return the same, compiled when its first token is generated.

    Raises:
        UsageError: as `open_eager`. MemoryError: there is no room.
    """
    return CompiledEngine(*_opened("pytorch-compile", spec, place))


def _opened(engine: str, spec: EngineSpec, place: Path) -> tuple[Any, Head, Identity, int]:
    torch.set_num_threads(spec.threads)
    compute = _computes_in(spec.precision, spec.device)
    source = ModelSource(spec.model.name, "folder", path=place)
    with _memory_errors():
        model = load_model(source, device=spec.device, dtype=dtype_name(compute)).model
        if _TYPES[spec.precision] is not compute:
            _round(model, spec.precision)
        head, weights = head_of(model), _held(spec.precision, compute)
        disk_bytes = sum(file.stat().st_size for file in weight_files(place))
        if spec.variant is not None:
            head, weights = _put(model, head, spec.variant)
            disk_bytes = read_manifest(spec.variant).size_bytes
    identity = Identity(
        engine=engine,
        provider=spec.device,
        dtype=_NAMES[compute],
        weights=weights,
        threads=torch.get_num_threads(),
        version=f"torch {torch.__version__}",
    )
    return model, head, identity, disk_bytes


def _computes_in(precision: FloatType, device: str) -> torch.dtype:
    """Return the type to compute in.

    A CPU computes fp16, and bf16 where it has no instructions for it, in fp32: the products are as exact.
    """
    if device == "cpu" and (precision == "fp16" or (precision == "bf16" and not has_bf16())):
        return torch.float32
    return _TYPES[precision]


def _held(precision: FloatType, compute: torch.dtype) -> str:
    same = _TYPES[precision] is compute
    return precision if same else f"{precision} values, computed in {_NAMES[compute]}"


@torch.inference_mode()
def _round(model: Any, precision: FloatType) -> None:
    """Give every parameter a value that the type holds.

    Raises:
        UsageError: a weight is too large for it.
    """
    for name, parameter in model.named_parameters():
        rounded = parameter.to(_TYPES[precision])
        check_finite(name, rounded, precision)
        parameter.copy_(rounded)


def _put(model: Any, head: Head, folder: Path) -> tuple[Head, str]:
    """Put the variant of `folder` into the model; its head, and what it is in words."""
    variant = load_variant(folder)
    head = install(model, variant, head=head, head_name=describe_model(model).head)
    grids = " + ".join(dict.fromkeys(str(weight.grid) for weight in variant.weights.values()))
    return head, f"{grids} as their float values"
