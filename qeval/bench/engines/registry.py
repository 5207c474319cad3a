"""The engines by name. None of their runtimes is imported before one is prepared or opened.

An engine is opened in two steps, in processes of their own. `prepare_engine(spec)` makes what the engine runs where the
cache doesn't hold it yet (an exported graph, a GGUF), at whatever memory that takes, and says where it lies; `open_it(
spec, place)` opens that and nothing else, so that the memory measured then is the engine's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qeval.bench.engines.base import Engine
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.errors import UsageError, unknown

Prepare = Callable[[EngineSpec], Path]
Open = Callable[[EngineSpec, Path], Engine]


@dataclass(frozen=True)
class Maker:
    """The functions of an engine's two steps (`module:function`), the modules they need, and what installs those.

    `is_light`: preparing makes nothing large, so that it needs no process of its own.
    """

    prepare: str
    open_it: str
    needs: tuple[str, ...]
    install: str
    about: str
    is_light: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the modules that aren't installed."""
        return tuple(name for name in self.needs if find_spec(name) is None)


_TORCH = "qeval.bench.engines.torch"
_ORT = "qeval.bench.engines.onnxruntime"
_FOLDER = "qeval.bench.engines.onnx_folder"
_GENAI = "qeval.bench.engines.genai"
_LLAMA = "qeval.bench.engines.llamacpp"
_GGUF = "qeval.bench.engines.gguf_file"
_REPLAY = "qeval.bench.engines.replay"
_CPU = "pip install 'qeval[cpu]'"

ENGINES: Mapping[str, Maker] = MappingProxyType({
    "onnxruntime": Maker(
        f"{_FOLDER}:prepare_onnx_folder", f"{_ORT}:open_onnxruntime", ("onnxruntime", "onnx_ir"), _CPU,
        "ONNX Runtime's InferenceSession, keys and values bound to the device",
    ),
    "onnxruntime-genai": Maker(
        f"{_FOLDER}:prepare_genai", f"{_GENAI}:open_genai", ("onnxruntime_genai", "onnx_ir"), _CPU,
        "onnxruntime-genai's Generator",
    ),
    "pytorch-eager": Maker(
        f"{_TORCH}:prepare_torch", f"{_TORCH}:open_eager", ("torch", "transformers"), "pip install qeval",
        "transformers in PyTorch, quantized weights as their float values", is_light=True,
    ),
    "pytorch-compile": Maker(
        f"{_TORCH}:prepare_torch", f"{_TORCH}:open_compiled", ("torch", "transformers"), "pip install qeval",
        "the same with a static cache and torch.compile", is_light=True,
    ),
    "llama.cpp": Maker(
        f"{_GGUF}:prepare_gguf", f"{_LLAMA}:open_llamacpp", ("llama_cpp",), "pip install 'qeval[llamacpp]'",
        "llama.cpp through llama-cpp-python",
    ),
    "replay": Maker(
        f"{_REPLAY}:prepare_replay", f"{_REPLAY}:open_replay", (), "pip install qeval",
        "a few formulas and no model, to try the program with: no check lets its speed stand", is_light=True,
    ),
})  # fmt: skip
"""Every engine that `--engines` takes."""


def maker(name: str) -> Maker:
    """Return the engine of that name.

    Raises:
        UsageError: there is none (the nearest are listed), or it isn't installed (with what installs it).
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    entry = ENGINES[name]
    if entry.missing:
        raise UsageError(f"The engine {name} needs {', '.join(entry.missing)}, not installed here: {entry.install}.")
    return entry


def prepare_engine(name: str, spec: EngineSpec) -> Path:
    """Make what the engine runs, or find it made.

    Raises:
        UsageError: the engine isn't there, or can't take the variant or the provider. QevalError: making it failed.
    """
    step: Prepare = _function(maker(name).prepare)
    return step(spec)


def open_engine(name: str, spec: EngineSpec, place: Path) -> Engine:
    """Open what was prepared.

    Raises:
        UsageError: the engine isn't there, or the provider asked for can't be had. QevalError: the runtime refuses.
        MemoryError: there is no room for the weights.
    """
    step: Open = _function(maker(name).open_it)
    return step(spec, place)


def _function(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
